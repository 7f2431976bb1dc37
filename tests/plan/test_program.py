"""Bytes that a compiled program sends and moves, against programs whose exchanges are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import sharding
from skysense_jax.plan import program


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=4, fsdp=2, tensor=1, expert=1)


def traffic_of(function, mesh, *arguments, out=None):
    shaped = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    shardings = None if out is None else NamedSharding(mesh, out)
    with jax.set_mesh(mesh):
        text = jax.jit(function, out_shardings=shardings).lower(*shaped).compile().as_text()
    return program.traffic(text, dict(mesh.shape))


P = PartitionSpec


@pytest.mark.parametrize(
    ("function", "kind", "axes", "group", "num_bytes"),
    [
        # a shard of 32 x 8 numbers; all others' of the group are received, so its own is sent on g - 1 times
        (lambda x: jax.lax.all_gather(x, "fsdp"), "all-gather", ("fsdp",), 2, 1024),
        (lambda x: jax.lax.all_gather(x, ("data", "fsdp")), "all-gather", ("data", "fsdp"), 8, 7 * 1024),
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", ("data",), 4, 2 * 1024 * 3 / 4),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", ("data",), 4, 1024 * 3 / 4),
        (
            lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True),
            "all-to-all",
            ("data",),
            4,
            1024 * 3 / 4,
        ),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), "collective-permute", ("fsdp",), 2, 1024),
    ],
)
def test_traffic_names_kind_axes_and_bytes_of_an_exchange(function, kind, axes, group, num_bytes, mesh):
    inside = jax.shard_map(
        function, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")), check_vma=False
    )
    (found,) = traffic_of(inside, mesh, ((256, 8), P(("data", "fsdp")))).collectives
    assert (found.kind, found.axes, found.group, found.count) == (kind, axes, group, 1)
    assert found.bytes_sent == num_bytes


def test_traffic_counts_an_exchange_in_a_loop_as_often_as_it_runs(mesh):
    def five_times(x):
        step = lambda c, _: (jnp.tanh(jax.lax.psum(c, "data")), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=5)[0]

    inside = jax.shard_map(five_times, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    (found,) = traffic_of(inside, mesh, ((64, 8), P("fsdp"))).collectives
    assert (found.kind, found.axes, found.count) == ("all-reduce", ("data",), 5)
    assert found.bytes_sent == 5 * 2 * (32 * 8 * 4) * 3 / 4


def test_traffic_of_memory_reads_and_writes_each_array_once_and_of_a_stack_its_slices(mesh):
    add = traffic_of(lambda x, y: x * 2 + y, mesh, ((1024, 64), P()), ((1024, 64), P()))
    assert add.memory_bytes == 3 * 1024 * 64 * 4
    assert add.collectives == ()

    def chain(stack, x):
        return jax.lax.scan(lambda c, w: (c + w, None), x, stack)[0]

    once = 1024 * 64 * 4
    moved = traffic_of(chain, mesh, ((16, 1024, 64), P()), ((1024, 64), P())).memory_bytes
    assert 16 * 3 * once <= moved <= 16 * 3.2 * once + 4 * once  # not 16 times the whole stack


def test_traffic_of_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        program.traffic("not HLO", {"data": 1})
