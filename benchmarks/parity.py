"""Do JAX and PyTorch compute the same? Random weights of each named size, exported, on the same input in both.

    python benchmarks/parity.py            # all cases (huge needs 16 GiB of memory)
    python benchmarks/parity.py tiny base  # those of the named sizes

Printed per case: the largest difference of stage-4 and fused features, in units of the features' standard deviation
(goal: below 1e-4), and of the gradient with respect to the normalised images, as a share of its largest value (goal:
below 1e-3). fp32 on both sides, evaluation mode. Exit code 1 if a case misses a goal.
"""

import dataclasses
import json
import math
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from skysense_jax import config as config_lib
from skysense_jax import dry_run
from skysense_jax import modalities as modalities_lib
from skysense_jax.batch import Views
from skysense_jax.data.geometry import share_true
from skysense_jax.export import names, write
from skysense_jax.export.modeling_skysensev2 import SkySenseV2
from skysense_jax.models import skysense
from skysense_jax.sharding import unbox
from skysense_jax.trees import named_leaves

FEATURE_GOAL, GRADIENT_GOAL = 1e-4, 1e-3
NUM_DATES = dict(hr=1, s2=3, s1=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A comparison: a named size, modalities, and (rows, columns) of ground in cells.

    Attributes:
      trim: pixels and thus tokens taken off the images' right and lower edges, in tokens of stage 1.
      masks: whether pixels, dates and clouds are masked.
      merging, num_prompts: of ``config.model.backbone``.
      gradients: whether they are compared too.
      batch: samples.
    """

    config: str
    modalities: tuple[str, ...]
    cells: tuple[int, int] = (4, 5)
    trim: int = 0
    masks: bool = False
    merging: str = "averaged"
    num_prompts: int = 4
    gradients: bool = True
    batch: int = 2

    def __str__(self) -> str:
        extras = [f"{self.cells[0]}x{self.cells[1]} cells", f"{self.trim} tokens off" if self.trim else ""]
        extras += ["masks" if self.masks else "", self.merging if self.merging != "averaged" else ""]
        extras += [f"{self.num_prompts} prompts" if self.num_prompts != 4 else ""]
        return f"{self.config:10s} {'+'.join(self.modalities):9s} {', '.join(filter(None, extras))}"


EACH = (("hr",), ("s2",), ("s1",), ("hr", "s2", "s1"))
SMALL_CASES = (
    *(Case(config, which) for config in ("tiny", "tiny_moe") for which in EACH),
    *(Case(config, EACH[3], masks=True) for config in ("tiny", "tiny_moe")),
    Case("tiny", ("hr",), cells=(3, 4), trim=3, masks=True),  # an odd grid at every merge
    Case("tiny_moe", ("s2", "s1"), cells=(13, 11), masks=True),  # windows do not divide the grid, some are shifted
    Case("tiny", EACH[3], merging="separate"),
    Case("tiny", ("s2", "s1"), masks=True, num_prompts=0),
)
CASES = (
    *SMALL_CASES,
    Case("tiny", EACH[3], cells=(64, 64), gradients=False, batch=1),  # 2048 px of hr with series of 64 cells
    *(Case(config, which) for config in ("small", "small_moe", "base", "base_moe") for which in EACH),
    *(Case(config, EACH[3], cells=(9, 10), masks=True) for config in ("small", "base_moe")),
    *(Case(config, EACH[3]) for config in ("large", "large_moe")),
    Case("huge", EACH[3], cells=(2, 2), batch=1),
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a case shows: ``features`` in standard deviations, ``gradients`` as a share of the largest, NaN if not."""

    features: float
    gradients: float


def random_params(shapes: Any, seed: int) -> Any:
    """Parameters far from their initial values, so that norms, biases, layer scales and routers all count."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        name = path.rpartition("/")[2]
        if name in ("scale", "attention_layer_scale", "mlp_layer_scale"):
            return 1 + 0.2 * noise
        if name == "logit_scale":
            return np.float32(np.log(10)) + 0.3 * noise
        if "kernel" in name or name == "router":
            return noise * np.float32(shape[-2] ** -0.5)
        return 0.2 * noise

    leaves = {path: draw(path, leaf.shape) for path, leaf in named_leaves(shapes).items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), list(leaves.values()))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of both sides: normalised images [B T H W C], masks of pixels [B T H W] and dates [B T], days [B T]."""

    images: Mapping[str, np.ndarray]
    valid: Mapping[str, np.ndarray]
    clear: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    days: Mapping[str, np.ndarray]


def random_inputs(case: Case, rows: tuple[modalities_lib.Modality, ...], seed: int) -> Inputs:
    """Blocky masks, so that tokens and cells are partly valid; with ``masks`` one date and one image are absent."""
    rng, out = np.random.default_rng(seed), Inputs({}, {}, {}, {}, {})
    for m in rows:
        off = case.trim * m.patch if m.tokens_per_cell > 1 else 0
        size = tuple(side * m.pixels_per_cell - off for side in case.cells)
        shape = (case.batch, NUM_DATES[m.name], *size)
        out.images[m.name] = rng.standard_normal((*shape, m.num_bands), np.float32)
        ones, block = np.ones(shape, bool), max(m.pixels_per_cell // 3, 1)
        for masks in (out.valid, out.clear):
            coarse = rng.random((*shape[:2], *(-(-side // block) for side in size))) < 0.7
            blocky = coarse.repeat(block, axis=2).repeat(block, axis=3)[:, :, : size[0], : size[1]]
            masks[m.name] = blocky if case.masks else ones
        out.present[m.name] = np.ones(shape[:2], bool)
        if case.masks and m.name != "hr":
            out.present[m.name][0, -1] = False
        out.days[m.name] = rng.integers(0, 367, shape[:2]).astype(np.int32)
        out.images[m.name][~out.valid[m.name]] = 0.0
    return out


def probe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a feature map in the sum whose gradient is compared."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def of_jax(model: skysense.SkySense, params: Any, rows, inputs: Inputs, gradients: bool):
    """Stage-4 features by modality, and "fused"; gradients with respect to the images by modality."""

    def padded(x: np.ndarray, side: int) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, 0), *((0, -n % side) for n in x.shape[2:4]), *((0, 0),) * (x.ndim - 4)))

    masks = {m.name: padded(inputs.valid[m.name], m.patch)[:, None] for m in rows}
    usable = {m.name: padded(inputs.valid[m.name] & inputs.clear[m.name], m.pixels_per_cell)[:, None] for m in rows}
    views = Views(
        images={},
        token_valid={m.name: share_true(masks[m.name], block=m.patch) >= 0.5 for m in rows},
        cell_usable={m.name: share_true(usable[m.name], block=m.pixels_per_cell) >= 0.5 for m in rows},
        labels=None,
        affine=jnp.zeros((len(inputs.present[rows[0].name]), 1, 2, 3)),
    )

    views, present, days = jax.tree.map(jnp.asarray, (views, inputs.present, inputs.days))

    def run(images, params):
        images = {
            m.name: jnp.pad(x, ((0, 0), (0, 0), *((0, -n % m.patch) for n in x.shape[2:4]), (0, 0)))[:, None]
            for m in rows
            for x in (images[m.name],)
        }
        arguments = dict(present=present, day_of_year=days, train=False, method="encode")
        out = model.apply({"params": params}, images, views, **arguments)
        found = {name: x[:, 0] for name, x in out.modality.items()} | {"fused": out.fused[:, 0]}
        found["fused_valid"] = out.fused_usable[:, 0].astype(jnp.float32)
        return sum((x * probe(name, x.shape)).sum() for name, x in found.items()), found

    step = jax.value_and_grad(run, has_aux=True) if gradients else lambda *a: (run(*a), {})
    (_, features), gradient = jax.jit(step)(dict(inputs.images), params)
    # what PyTorch is given in place of invalid pixels it does not read; JAX is given the zeros that it would put there
    gradient = {name: x * inputs.valid[name][..., None] for name, x in gradient.items()}
    return jax.device_get((features, gradient))


def of_torch(model: SkySenseV2, inputs: Inputs, gradients: bool):
    """As ``of_jax``, from the exported network."""
    tensors = lambda arrays: {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}  # noqa: E731
    images = {name: x.movedim(-1, 2).requires_grad_(gradients) for name, x in tensors(inputs.images).items()}
    days = {name: x.long() for name, x in tensors(inputs.days).items()}
    masks = {key: tensors(getattr(inputs, key)) for key in ("valid", "clear", "present")}
    with torch.set_grad_enabled(gradients):
        out = model(images, **masks, day_of_year=days)
    found = {name: maps[3].movedim(2, -1) for name, maps in out.stages.items()} | {"fused": out.fused.movedim(1, -1)}
    found["fused_valid"] = out.fused_valid.float()
    features = {name: x.detach().numpy() for name, x in found.items()}
    if not gradients:
        return features, {}
    sum((x * torch.from_numpy(probe(name, x.shape))).sum() for name, x in found.items()).backward()
    return features, {name: x.grad.movedim(2, -1).numpy() for name, x in images.items()}


def build(case: Case):
    """The JAX network with all modalities, their rows, and ``config.model``."""
    of_config = config_lib.load(f"configs/{case.config}.py")
    of_config.model.compute_dtype = "float32"
    of_config.model.backbone.update(merging=case.merging, num_prompts=case.num_prompts)
    rows = modalities_lib.select(of_config.data.modalities)
    return skysense.build(rows, **of_config.model), rows, of_config.model


def run_case(case: Case, seed: int = 0) -> Difference:
    """The difference that a case shows."""
    model, rows, config = build(case)
    shapes = dry_run.batch_shapes(
        rows, batch_size=1, num_dates=NUM_DATES, views=dict(num_global=1, num_local=1, global_cells=2, local_cells=2)
    )
    boxed = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch, train=False), shapes)["params"]
    params = random_params({part: unbox(boxed)[part] for part in ("backbone", "fusion")}, seed)
    table = list(names.weights(rows, **{part: config[part] for part in ("backbone", "fusion")}))
    state = names.join(table, {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()})
    description = write.describe(rows, backbone=config.backbone, fusion=config.fusion, training={})
    with torch.device("meta"):
        network = SkySenseV2(json.loads(json.dumps(description)), normalise=False).eval()
    network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, assign=True)
    del state

    used = tuple(row for row in rows if row.name in case.modalities)
    inputs = random_inputs(case, used, seed + 1)
    got, got_gradients = of_torch(network, inputs, case.gradients)
    del network
    wanted, wanted_gradients = of_jax(model, params, used, inputs, case.gradients)
    np.testing.assert_array_equal(got.pop("fused_valid"), wanted.pop("fused_valid"))
    assert got.keys() == wanted.keys()
    worst = lambda got, wanted, unit: max(  # noqa: E731
        float(np.abs(got[name] - x).max() / unit(x)) for name, x in wanted.items()
    )
    return Difference(
        features=worst(got, wanted, np.std),
        gradients=worst(got_gradients, wanted_gradients, lambda x: np.abs(x).max()) if case.gradients else math.nan,
    )


def main(sizes: list[str]) -> int:
    """Prints the table; 1 if a case misses a goal."""
    known = {case.config.removesuffix("_moe") for case in CASES}
    if not set(sizes) <= known:
        sys.exit(f"error: sizes {' '.join(sizes)}; wanted some of {' '.join(sorted(known))}")
    cases = [case for case in CASES if not sizes or case.config.removesuffix("_moe") in sizes]
    missed = 0
    print(f"{'case':44s} features  gradients  seconds   (goals {FEATURE_GOAL:g} and {GRADIENT_GOAL:g})")
    for case in cases:
        start = time.monotonic()
        difference = run_case(case)
        jax.clear_caches()  # what is compiled keeps its constants, gigabytes over all cases
        # a NaN compares False: a feature that is none misses
        good = difference.features < FEATURE_GOAL and not difference.gradients >= GRADIENT_GOAL
        missed += not good
        gradients = "        -" if math.isnan(difference.gradients) else f"{difference.gradients:9.1e}"
        seconds = time.monotonic() - start
        print(
            f"{case!s:44s} {difference.features:8.1e} {gradients}  {seconds:7.1f}{'' if good else '  MISSED'}",
            flush=True,
        )
    print(f"{len(cases) - missed} of {len(cases)} within the goals (torch {torch.__version__}, jax {jax.__version__})")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
