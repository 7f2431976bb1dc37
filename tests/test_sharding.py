"""A mesh that does not fit is refused, and what is placed is really placed: no silent no-op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from skysense_jax import sharding
from skysense_jax.sharding import ACTIVATION, BATCH, EMBED, MLP, UNSHARDED, constrain, constrain_batch, make_mesh


def test_make_mesh_fills_the_free_axis_and_keeps_the_order_of_devices():
    mesh = make_mesh(data=-1, fsdp=2, tensor=2, expert=1)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_make_mesh_takes_some_of_the_devices():
    assert make_mesh(data=1, fsdp=3, tensor=1, expert=1, devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1, 1), "asks for 3 devices.*there are 8"),
        ((-1, 3, 1, 1), "there are 8"),
        ((16, 1, 1, 1), "asks for 16 devices.*there are 8"),
        ((-1, -1, 1, 1), "at most one of them -1"),
        ((0, 8, 1, 1), "wanted sizes of 1 or more"),
        ((-2, 4, 1, 1), "wanted sizes of 1 or more"),
    ],
)
def test_make_mesh_that_does_not_match_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=rf"config.mesh.*{message}"):
        make_mesh(*sizes)


def test_constrain_unknown_name_is_an_error():
    with jax.set_mesh(make_mesh(4, 2, 1, 1)), pytest.raises(ValueError, match="surprise"):
        jax.jit(lambda x: constrain(x, BATCH, "surprise")).lower(jnp.ones((8, 3)))


def test_constrain_under_a_mesh_is_in_the_lowered_program_and_outside_is_not():
    function = lambda x: constrain_batch(x * 2)  # noqa: E731
    x = jnp.ones((8, 3, 5))
    assert "sharding_constraint" not in jax.jit(function).lower(x).as_text()
    with jax.set_mesh(make_mesh(2, 2, 1, 2)):
        lowered = jax.jit(function).lower(x).as_text()
    assert "sharding_constraint" in lowered
    assert '[{"data", "fsdp", "expert"}, {}, {}]' in lowered


@pytest.mark.parametrize(
    ("size", "axes", "placed"),
    [
        (8, (EMBED, MLP), ("fsdp", "tensor")),
        (6, (EMBED, MLP), (None, "tensor")),  # fsdp 4 does not divide 6: whole, as such parameters are
        (8, (UNSHARDED, EMBED), (None, "fsdp")),
    ],
)
def test_gathered_is_its_weight_and_its_gradient_lies_where_the_weight_does(size, axes, placed):
    shape = (size, 4) if axes[0] == EMBED else (4, size)
    weight = jnp.arange(size * 4.0).reshape(shape)
    x = jnp.linspace(0.0, 1.0, 8 * shape[0]).reshape(8, shape[0])
    loss = lambda weight, x: jnp.square(x @ sharding.gathered(weight, *axes)).sum()  # noqa: E731
    wanted = jax.value_and_grad(lambda weight, x: jnp.square(x @ weight).sum())(weight, x)
    with jax.set_mesh(make_mesh(1, 4, 2, 1)):
        found = jax.jit(jax.value_and_grad(loss))(weight, x)
        lowered = jax.jit(jax.grad(loss)).lower(weight, x).as_text()
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
    assert found[1].sharding.spec == PartitionSpec(*placed)
    assert "sharding_constraint" in lowered
    np.testing.assert_allclose(jax.grad(loss)(weight, x), wanted[1], rtol=1e-6)  # outside a mesh too


def test_constrain_names_decide_where_the_result_lives():
    with jax.set_mesh(make_mesh(2, 2, 2, 1)):
        out = jax.jit(lambda x: constrain(x, BATCH, ACTIVATION, MLP))(jnp.ones((8, 3, 4)))
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 3, 2)}


def test_batch_sharding_spreads_samples_over_data_fsdp_and_expert():
    x = np.arange(8 * 3).reshape(8, 3)
    placed = jax.device_put(x, sharding.batch_sharding(make_mesh(2, 2, 1, 2)))
    assert [shard.data.shape for shard in placed.addressable_shards] == [(1, 3)] * 8
    placed = jax.device_put(x, sharding.batch_sharding(make_mesh(2, 1, 4, 1)))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 3)}


def boxed_shapes():
    box = lambda shape, *names: nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=names)  # noqa: E731
    return {
        "kernel": box((6, 8), EMBED, MLP),
        "odd": box((7, 8), EMBED, MLP),  # 7 is not divisible: kept whole
        "bias": box((8,), UNSHARDED),
        "counter": jax.ShapeDtypeStruct((), jnp.int32),
    }


def test_tree_shardings_follow_names_and_keep_whole_what_does_not_divide():
    shardings = sharding.tree_shardings(boxed_shapes(), make_mesh(2, 2, 2, 1))
    assert {name: s.spec for name, s in shardings.items()} == {
        "kernel": PartitionSpec("fsdp", "tensor"),
        "odd": PartitionSpec(None, "tensor"),
        "bias": PartitionSpec(None),
        "counter": PartitionSpec(),
    }
    assert sharding.undivided(boxed_shapes(), make_mesh(2, 2, 2, 1)) == ["['odd']"]
    assert sharding.undivided(boxed_shapes(), make_mesh(8, 1, 1, 1)) == []
    plain = sharding.unbox(boxed_shapes())
    zeros = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), plain), out_shardings=shardings)()
    assert {name: x.addressable_shards[0].data.shape for name, x in zeros.items()} == {
        "kernel": (3, 4),
        "odd": (7, 4),
        "bias": (8,),
        "counter": (),
    }


def test_tree_shardings_unknown_name_is_an_error():
    boxed = {"kernel": nn.Partitioned(jax.ShapeDtypeStruct((4,), jnp.float32), names=("surprise",))}
    with pytest.raises(ValueError, match=r"'surprise' has no rule; known: .*'embed'"):
        sharding.tree_shardings(boxed, make_mesh(8, 1, 1, 1))


def test_unbox_works_on_shapes_and_on_arrays_outside_a_mesh():
    assert sharding.unbox(boxed_shapes())["kernel"].shape == (6, 8)
    array = nn.Partitioned(jnp.ones((2, 3)), names=(EMBED, MLP))
    assert isinstance(sharding.unbox({"x": array})["x"], jax.Array)
