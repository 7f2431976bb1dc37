"""Exchanges of weights and gradients on a TPU, in its compiler's own program of a scanned stack of MLPs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import compiler, targets
from skysense_jax.plan import forecast, program
from skysense_jax.sharding import EMBED, MLP, constrain_batch, gathered

WIDTH, HIDDEN, LAYERS, ROWS = 1024, 4096, 3, 4096


@pytest.fixture(scope="module")
def mesh():
    return forecast.make_mesh(targets.parse("v5p:8"), dict(data=1, fsdp=8, tensor=1, expert=1))


def events_of(mesh, options):
    """What one step of gradient descent on the stack does."""

    def loss(weights, x):
        def body(x, pair):
            up = gathered(pair[0].astype(x.dtype), EMBED, MLP)
            down = gathered(pair[1].astype(x.dtype), MLP, EMBED)
            return constrain_batch(x + jax.nn.gelu(x @ up) @ down), None

        return jnp.square(jax.lax.scan(jax.checkpoint(body), x, weights)[0].astype(jnp.float32)).mean()

    def step(weights, x):
        return jax.tree.map(lambda weight, gradient: weight - gradient, weights, jax.grad(loss)(weights, x))

    with jax.set_mesh(mesh):
        of = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(  # noqa: E731
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )
        weights = (
            of((LAYERS, WIDTH, HIDDEN), jnp.float32, None, "fsdp", None),
            of((LAYERS, HIDDEN, WIDTH), jnp.float32, None, None, "fsdp"),
        )
        x = of((8, ROWS, WIDTH), jnp.bfloat16, "fsdp")
        lowered = jax.jit(step, out_shardings=tuple(weight.sharding for weight in weights)).lower(weights, x)
        return program.read(lowered.compile(options).as_text(), dict(mesh.shape))


def test_gathers_run_beside_products_and_no_gradient_is_summed_whole(mesh):
    events = events_of(mesh, compiler.options(mesh.devices.flat[0]))
    exchanges = [(event, times) for event, times in program.flatten(events) if isinstance(event, program.Exchange)]
    gathers = [event for event, _ in exchanges if event.kind == "all-gather"]
    assert any(event.name for event in gathers)  # others work until their Wait
    whole = 2 * WIDTH * HIDDEN  # bytes of a weight
    assert not [event for event, _ in exchanges if event.kind == "all-reduce" and event.bytes_sent > whole / 4]
    # each layer's two gradients, into shards
    sent = sum(e.bytes_sent * times for e, times in exchanges if e.kind in ("reduce-scatter", "collective-permute"))
    assert 7 / 8 <= sent / (LAYERS * 2 * whole) <= 1.5
