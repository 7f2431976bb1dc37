"""FLOPs of a traced function: matrix products, convolutions and attention of its jaxpr, loops times their length.

Compilers count the body of a loop once (TPU) or nothing (GPU), so the program is counted before it is compiled.
A multiply-add is two; recomputation that a checkpoint policy asks for is in the jaxpr and counts.
"""

import math
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
    """FLOPs of one run of a jaxpr, over all devices; of what its results do not need, which no compiler keeps, none.

    Raises:
      ValueError: a loop whose length is not known before it runs holds matrix products.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_equations(needed)


def _of_equations(jaxpr: Any) -> float:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_product(equation)
    if name.startswith("dot_product_attention_"):  # cuDNN's, B N A K by B M A K; its gradient makes the scores again
        query, key = (variable.aval.shape for variable in equation.invars[:2])
        return (10.0 if "bwd" in name else 4.0) * math.prod(query) * key[1]
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        out_features = params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(out) * math.prod(kernel) / kernel[out_features]
    if name == "pallas_call":  # a kernel of ours says it itself
        return float(params["cost_estimate"].flops)
    inner = [_of_equations(jaxpr) for jaxpr in _inner(params)]
    if name == "scan":
        return params["length"] * sum(inner, 0.0)
    if name == "shard_map":  # its body is a device's
        return params["mesh"].size * sum(inner, 0.0)
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("a while loop with matrix products: how often it runs is not known before it does")
    return sum(inner, 0.0)


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters: of calls, branches, bodies."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
