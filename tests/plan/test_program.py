"""What compiled programs multiply, move and send, against programs of which it is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import sharding
from skysense_jax.plan import hlo, program


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=4, fsdp=2, tensor=1, expert=1)


def totals_of(function, mesh, *arguments, out=None):
    shaped = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    shardings = None if out is None else NamedSharding(mesh, out)
    with jax.set_mesh(mesh):
        text = jax.jit(function, out_shardings=shardings).lower(*shaped).compile().as_text()
    return program.totals(program.read(text, dict(mesh.shape)))


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
def test_totals_names_kind_axes_and_bytes_of_an_exchange(function, kind, axes, group, num_bytes, mesh):
    inside = jax.shard_map(
        function, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")), check_vma=False
    )
    (found,) = totals_of(inside, mesh, ((256, 8), P(("data", "fsdp")))).collectives
    assert (found.kind, found.axes, found.group, found.count) == (kind, axes, group, 1)
    assert found.bytes_sent == num_bytes


def test_totals_counts_an_exchange_in_a_loop_as_often_as_it_runs(mesh):
    def five_times(x):
        step = lambda c, _: (jnp.tanh(jax.lax.psum(c, "data")), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=5)[0]

    inside = jax.shard_map(five_times, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    (found,) = totals_of(inside, mesh, ((64, 8), P("fsdp"))).collectives
    assert (found.kind, found.axes, found.count) == ("all-reduce", ("data",), 5)
    assert found.bytes_sent == 5 * 2 * (32 * 8 * 4) * 3 / 4


def test_totals_of_memory_reads_and_writes_each_array_once_and_of_a_stack_its_slices(mesh):
    add = totals_of(lambda x, y: x * 2 + y, mesh, ((1024, 64), P()), ((1024, 64), P()))
    assert add.memory_bytes == 3 * 1024 * 64 * 4
    assert add.collectives == ()

    def chain(stack, x):
        return jax.lax.scan(lambda c, w: (c + w, None), x, stack)[0]

    once = 1024 * 64 * 4
    moved = totals_of(chain, mesh, ((16, 1024, 64), P()), ((1024, 64), P())).memory_bytes
    assert 16 * 3 * once <= moved <= 16 * 3.2 * once + 4 * once  # not 16 times the whole stack


def test_totals_of_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        program.read("not HLO", {"data": 1})


def test_totals_of_flops_are_those_of_products_loops_and_convolutions(mesh):
    product = lambda x, y: jnp.einsum("bij,bjk->bik", x, y)  # noqa: E731
    found = totals_of(product, mesh, ((3, 40, 50), P()), ((3, 50, 60), P()))
    assert found.flops == 2 * 3 * 40 * 50 * 60
    power = lambda x, y: jax.lax.scan(lambda c, _: (c @ y, None), x, None, length=7)[0]  # noqa: E731
    assert totals_of(power, mesh, ((40, 50), P()), ((50, 50), P())).flops == 7 * 2 * 40 * 50 * 50
    conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = totals_of(conv, mesh, ((2, 10, 10, 5), P()), ((3, 3, 5, 8), P()))
    assert found.flops == 2 * (2 * 8 * 8 * 8) * (3 * 3 * 5)


def test_products_of_fp32_in_parts_take_several_passes_of_a_tpu():
    text = """
HloModule m, is_scheduled=true

%fused (a: f32[8,4], b: f32[4,16]) -> f32[8,16] {
  %a = f32[8,4] parameter(0)
  %b = f32[4,16] parameter(1)
  %full = f32[8,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %plain = f32[8,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sum = f32[8,16] add(%full, %plain)
}

ENTRY %main (x: f32[8,4], y: f32[4,16]) -> f32[8,16] {
  %x = f32[8,4] parameter(0)
  %y = f32[4,16] parameter(1)
  ROOT %both = f32[8,16] fusion(%x, %y), kind=kOutput, calls=%fused
}
"""
    (work,) = program.read(text, {"data": 1})
    assert (work.flops, work.passes) == (2 * 2 * 8 * 4 * 16, 3.5)
    (work,) = program.read(text.replace("{highest,highest}", "{high,high}"), {"data": 1})
    assert work.passes == 2.0


# What compilers of accelerators write, cut down: loops that count by two, an exchange beside three fusions, one that
# begins and ends by name, a product of cuBLAS, a batch of products as a convolution with dilated windows.
ACCELERATOR = """
HloModule m, is_scheduled=true

%begin (p.0: f32[8]) -> (f32[8], f32[32]) {
  %p.0 = f32[8]{0} parameter(0)
  %all-gather.1 = f32[32]{0} all-gather(%p.0), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %custom-call.1 = (f32[8]{0}, f32[32]{0}) custom-call(%p.0, %all-gather.1), custom_call_target="Start"
}

%async_collective_fusion.1 (p.1: f32[16], p.2: f32[8]) -> (f32[16], f32[8]) {
  %p.1 = f32[16]{0} parameter(0)
  %p.2 = f32[8]{0} parameter(1)
  %twice.1 = f32[16]{0} add(%p.1, %p.1)
  %all-gather.2 = f32[32]{0} all-gather(%p.2), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %tuple.1 = (f32[16]{0}, f32[8]{0}) tuple(%twice.1, %p.2)
}

%end (p.3: f32[8]) -> f32[32] {
  %p.3 = f32[8]{0} parameter(0)
  %all-gather.3 = f32[32]{0} all-gather(%p.3), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %custom-call.2 = f32[32]{0} custom-call(%p.3, %all-gather.3), custom_call_target="Done"
}

%condition (c.0: (s32[], f32[16])) -> pred[] {
  %c.0 = (s32[], f32[16]{0}) parameter(0)
  %bound = s32[] constant(8)
  %counter.0 = s32[] get-tuple-element(%c.0), index=0
  ROOT %less = pred[] compare(%counter.0, %bound), direction=LT
}

%body (b.0: (s32[], f32[16])) -> (s32[], f32[16]) {
  %b.0 = (s32[], f32[16]{0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%b.0), index=0
  %two = s32[] constant(2)
  %counter.2 = s32[] add(%counter.1, %two)
  %x.0 = f32[16]{0} get-tuple-element(%b.0), index=1
  %permute-start = (f32[16]{0}, f32[16]{0}) collective-permute-start(%x.0), source_target_pairs={{0,1},{1,0}}
  %y.0 = f32[16]{0} negate(%x.0)
  %permute-done = f32[16]{0} collective-permute-done(%permute-start)
  ROOT %next = (s32[], f32[16]{0}) tuple(%counter.2, %permute-done)
}

ENTRY %main (a.0: f32[8], a.1: f32[16], a.2: (s32[], f32[16]), a.3: f32[4,5], a.4: f32[5,6]) -> f32[4,6] {
  %a.5 = bf16[2,6,4,8]{3,2,1,0} parameter(5)
  %a.0 = f32[8]{0} parameter(0)
  %a.1 = f32[16]{0} parameter(1)
  %a.2 = (s32[], f32[16]{0}) parameter(2)
  %a.3 = f32[4,5]{1,0} parameter(3)
  %a.4 = f32[5,6]{1,0} parameter(4)
  %async-collective-start = (f32[8]{0}, f32[32]{0}) fusion(%a.0), kind=kCustom, calls=%begin
  %fusion.1 = (f32[16]{0}, f32[8]{0}) fusion(%a.1, %a.0), kind=kOutput, calls=%async_collective_fusion.1
  %async-collective-done = f32[32]{0} fusion(%a.0), kind=kCustom, calls=%end
  %while.1 = (s32[], f32[16]{0}) while(%a.2), condition=%condition, body=%body
  %attend = bf16[2,6,4,8]{3,2,1,0} custom-call(%a.5, %a.5, %a.5), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %g = f32[4,6]{1,0} custom-call(%a.3, %a.4), custom_call_target="__cublas$gemm", lhs_contracting_dimensions":["1"]
}
"""


def test_read_gives_the_events_of_accelerators_programs_in_order():
    gather, work, wait, loop, attention, product = program.read(ACCELERATOR, {"data": 2, "fsdp": 4})
    assert gather == program.Exchange("all-gather", ("fsdp",), 4, 3 * 32.0, "5")
    assert work == program.Work(0.0, 2 * 64.0)  # not the exchange's buffers, which are handed on
    assert wait == program.Wait("5")
    assert loop.times == 4
    permute = program.Exchange("collective-permute", ("fsdp",), 2, 64.0, "permute-start")
    assert [event for event in loop.body if not isinstance(event, program.Work)] == [
        permute,
        program.Wait("permute-start"),
    ]
    assert attention.flops == 5 * 2 * 2 * 4 * 6 * 6 * 8
    assert product.flops == 2 * 4 * 5 * 6


def test_play_hides_an_exchange_behind_the_work_until_its_end():
    work, fetch = program.Work(1.0, 0.0), program.Exchange("all-gather", ("fsdp",), 4, 3.0, "a")
    alone = program.Exchange("all-reduce", ("data",), 2, 2.0)
    seconds = lambda events: program.play(events, lambda w: w.flops, lambda e: e.bytes_sent)  # noqa: E731
    assert seconds([fetch, work, program.Wait("a"), work]) == (2.0, 2.0)
    assert seconds([fetch, work, work, work, work, program.Wait("a")]) == (4.0, 0.0)
    assert seconds([fetch, alone, program.Wait("a")]) == (0.0, 5.0)  # one after the other
    assert seconds([work, program.Loop(3, (fetch, work, program.Wait("a"))), alone]) == (4.0, 3 * 2.0 + 2.0)


@pytest.mark.parametrize(
    ("text", "first", "number"),
    [
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3], 2),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4], 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7], 1),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2], 4),  # the outer half of b
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1], 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3], 2),
        ("[4,2]<=[2,4]T(1,0)", [0, 4], 4),
        ("{{0,3},{1,2}}", [0, 3], 2),
    ],
)
def test_groups_are_read_in_each_way_of_writing(text, first, number):
    found = hlo.groups(f", replica_groups={text}, dimensions={{0}}", 8)
    assert found[0] == first
    assert len(found) == number


def test_loop_that_does_not_say_how_often_it_runs_is_refused():
    text = ACCELERATOR.replace("%bound = s32[] constant(8)", "%bound = s32[] negate(%c.0)")
    with pytest.raises(ValueError, match=r"while\.1 does not say how often"):
        program.read(text, {"data": 2, "fsdp": 4})


@pytest.mark.parametrize(
    ("image", "kernel", "out", "how", "flops"),
    [
        # as compilers of TPUs write: x w, w x with the rows of x as places of the kernel, a batch of products, its like
        ("2,3,5,7", "7,11,1,1", "2,3,5,11", "window={size=1x1}, dim_labels=01bf_io01->01bf", 2 * 2 * 3 * 5 * 7 * 11),
        (
            "11,7,1,1",
            "2,3,5,7",
            "2,3,5,11",
            "window={size=2x3 pad=1_1x2_2 rhs_reversal=1x1}, dim_labels=bf01_01oi->01fb",
            2 * 2 * 3 * 5 * 7 * 11,
        ),
        (
            "2,13,3,7",
            "2,17,3,7",
            "2,3,13,17",
            "window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=0b1f_0o1i->01bf",
            2 * 2 * 3 * 13 * 17 * 7,
        ),
    ],
)
def test_totals_count_places_of_a_kernel_that_lie_on_the_image(image, kernel, out, how, flops):
    text = f"""
ENTRY %main (a: f32[{image}], b: f32[{kernel}]) -> f32[{out}] {{
  %a = f32[{image}]{{3,2,1,0}} parameter(0)
  %b = f32[{kernel}]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[{out}]{{3,2,1,0}} convolution(%a, %b), {how}
}}
"""
    assert program.totals(program.read(text, {"data": 1})).flops == flops


def test_totals_of_a_kernel_of_ours_are_what_it_says_and_its_arrays():
    text = """ENTRY %main.1 (q.1: bf16[8,16,64]) -> bf16[8,16,64] {
  %q.1 = bf16[8,16,64]{2,1,0} parameter(0)
  ROOT %k.1 = bf16[8,16,64]{2,1,0} custom-call(%q.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv==","cost_estimate":{"flops":"1234","transcendentals":"5","bytes_accessed":"32768"}}}
}
"""  # noqa: E501
    found = program.totals(program.read(text, {"data": 1}))
    assert (found.flops, found.memory_bytes) == (1234.0, 2 * 8 * 16 * 64 * 2)


def test_notations_and_types_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match=r"replica_groups=<new>.*: a notation of groups that is not known"):
        hlo.groups(", replica_groups=<new>, dimensions={0}", 8)
    assert hlo.groups(", replica_groups={}, dimensions={0}", 4) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"unknown types \['f4new'\]"):
        hlo.parse("ENTRY %main (x.1: f32[8]) -> f32[8] {\n  ROOT %x.1 = f4new[8]{0} parameter(0)\n}\n")


def test_of_a_conditional_the_dearest_branch_counts():
    text = """%cheap (a.1: f32[8,8]) -> f32[8,8] {
  ROOT %a.1 = f32[8,8]{1,0} parameter(0)
}

%dear (b.1: f32[8,8]) -> f32[8,8] {
  %b.1 = f32[8,8]{1,0} parameter(0)
  ROOT %d.1 = f32[8,8]{1,0} dot(%b.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p.1: s32[], x.1: f32[8,8]) -> f32[8,8] {
  %p.1 = s32[] parameter(0)
  %x.1 = f32[8,8]{1,0} parameter(1)
  ROOT %c.1 = f32[8,8]{1,0} conditional(%p.1, %x.1, %x.1), branch_computations={%dear, %cheap, %dear}
}
"""
    assert program.totals(program.read(text, {"data": 1})).flops == 2 * 8**3


_NESTED = """HloModule nested, num_partitions=1

%inner (p.0: f32[24,8,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[24,8,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %reshape = f32[8,128]{1,0} bitcast(%slice)
}

%outer (q.0: f32[24,8,128], q.1: s32[], q.2: f32[8,128]) -> f32[8,128] {
  %q.0 = f32[24,8,128]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = f32[8,128]{1,0} parameter(2)
  %sliced = f32[8,128]{1,0} fusion(%q.0, %q.1), kind=kLoop, calls=%inner
  ROOT %add = f32[8,128]{1,0} add(%sliced, %q.2)
}

ENTRY %main (a: f32[24,8,128], i: s32[], b: f32[8,128]) -> f32[8,128] {
  %a = f32[24,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,128]{1,0} parameter(2)
  ROOT %fusion = f32[8,128]{1,0} fusion(%a, %i, %b), kind=kLoop, calls=%outer
}
"""


def test_slice_in_a_fusion_inside_a_fusion_is_read_as_a_slice():
    """As a TPU's compiler writes what reads one layer of what a scan has kept: a slice, an addend, a result."""
    of_index = 4
    assert program.totals(program.read(_NESTED, {"data": 1})).memory_bytes == 3 * 8 * 128 * 4 + of_index
