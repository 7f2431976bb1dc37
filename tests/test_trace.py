"""Where device time goes: arithmetic of intervals against counting instants, traces made by hand in each layout."""

import itertools

import jax
import numpy as np
import pytest

from skysense_jax import trace
from skysense_jax.trace import COMPUTE, COPY, Op


def instants(intervals, end=60):
    """Which of the unit instants lie in the intervals."""
    inside = np.zeros(end, bool)
    for start, stop in intervals:
        inside[int(start) : int(stop)] = True
    return inside


def drawn(rng, count):
    starts = rng.integers(0, 50, count)
    return [(float(start), float(start + size)) for start, size in zip(starts, rng.integers(0, 10, count))]


@pytest.mark.parametrize("seed", range(20))
def test_merge_and_subtract_equal_counting_instants(seed):
    rng = np.random.default_rng(seed)
    a, b = (drawn(rng, int(rng.integers(0, 9))) for _ in range(2))
    merged, taken = trace.merge(a), trace.merge(b)
    np.testing.assert_array_equal(instants(merged), instants(a))
    assert trace.length(merged) == instants(a).sum()
    assert all(first[1] < second[0] for first, second in itertools.pairwise(merged))
    left = trace.subtract(merged, taken)
    np.testing.assert_array_equal(instants(left), instants(a) & ~instants(b))
    assert trace.length(left) == (instants(a) & ~instants(b)).sum()


def ms(device, kind, start, end):
    return Op(device, kind, start * 1e6, end * 1e6)


def test_split_counts_what_compute_does_not_hide():
    ops = [
        ms("a", COMPUTE, 0, 10),
        ms("a", COMPUTE, 14, 20),
        ms("a", "all_gather", 8, 12),  # 2 hidden, 2 not
        ms("a", "all_reduce", 11, 16),  # 2 not hidden, of which 1 beside the other exchange
        ms("a", COPY, 12, 24),  # 4 beside nothing else
    ]
    found = trace.split(ops, num_steps=1)
    assert found.numbers() == pytest.approx(
        {
            "profile/step_seconds": 0.024,
            "profile/compute_seconds": 0.016,
            "profile/exposed_exchange_seconds": 0.004,
            "profile/exposed_copy_seconds": 0.004,
            "profile/idle_seconds": 0.0,
            "profile/exchange_seconds": 0.008,
            "profile/all_gather_seconds": 0.004,
            "profile/all_reduce_seconds": 0.005,
        }
    )


def test_split_is_a_mean_over_steps_and_devices_of_one_window():
    ops = [
        ms("a", COMPUTE, 0, 30),
        ms("b", COMPUTE, 10, 20),  # of another device: hides nothing
        ms("b", "permute", 20, 40),
    ]
    found = trace.split(ops, num_steps=2)
    assert (found.num_devices, found.num_steps, found.step) == (2, 2, pytest.approx(0.02))
    assert found.compute == pytest.approx(0.04 / 4)
    assert found.exposed_exchange == pytest.approx(0.02 / 4)
    assert found.idle == pytest.approx(0.02 / 4)  # 10 ms of each


@pytest.mark.parametrize("seed", range(8))
def test_parts_of_a_split_make_the_step(seed):
    rng = np.random.default_rng(seed)
    kinds = [COMPUTE, COPY, "all_gather", "send"]
    ops = [Op(f"d{i % 3}", kinds[int(rng.integers(4))], *interval) for i, interval in enumerate(drawn(rng, 30))]
    found = trace.split(ops, num_steps=3)
    assert found.compute + found.exposed_exchange + found.exposed_copy + found.idle == pytest.approx(found.step)
    assert found.exposed_exchange <= found.exchange <= sum(found.exchanges.values()) + 1e-15


def test_split_of_nothing_is_nothing():
    assert trace.split([], num_steps=3) is None


def test_text_names_parts_and_kinds():
    found = trace.split([ms("a", COMPUTE, 0, 6), ms("a", "all_to_all", 6, 8)], num_steps=1)
    text = found.text()
    assert "mean of 1 steps on 1 devices" in text
    assert [line.split()[-3:] for line in text.splitlines() if "hidden by" in line] == [["2.00", "ms", "25.0%"]]
    assert [line.split() for line in text.splitlines() if "all_to_all" in line] == [
        ["all_to_all", "2.00", "ms", "25.0%"]
    ]


@pytest.mark.parametrize(
    ("name", "instruction", "kind"),
    [
        ("all-reduce.12", "all-reduce.12", "all_reduce"),
        ("psum.3", "psum.3", "all_reduce"),
        ("all_gather.clone.1", "", "all_gather"),
        (
            "%all-gather-start.2 = (bf16[4]{0:T(512)}, bf16[32]{0:T(512)S(1)}) all-gather-start(%p.1), ...",
            "",
            "all_gather",
        ),
        ("%psum_scatter.9 = f32[4]{0} reduce-scatter(%x), dimensions={0}", "", "reduce_scatter"),
        ("%all-reduce-scatter.1 = f32[4]{0} fusion(%x), kind=kCustom", "", "reduce_scatter"),
        ("ragged-all-to-all.1", "", "all_to_all"),
        ("collective-permute-done.4", "", "permute"),
        ("send-done.2", "", "send"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather-start.1", "all_gather"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "all-to-all-start.1", "all_to_all"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(...)", "", "reduce_scatter"),
        ("MemcpyD2H", "", COPY),
        ("copy.7", "copy.7", COPY),
        ("%copy-done.7 = bf16[4]{0} copy-done(%copy-start.7)", "", COPY),
        ("infeed.1", "", COPY),
        ("%while.3 = (s32[], f32[4]) while(%tuple), body=%b", "", None),
        ("while.3", "while.3", None),
        ("add_reduce_fusion.5", "add_reduce_fusion.5", COMPUTE),
        ("transpose_copy_fusion", "transpose_copy_fusion", COMPUTE),
        ("reduce.3", "reduce.3", COMPUTE),
        ("gemm_fusion_dot_12", "gemm_fusion_dot.12", COMPUTE),
        ("%fusion.8 = f32[4]{0} fusion(%all-gather-done.2, %copy.1), calls=%c", "", COMPUTE),
    ],
)
def test_kind_of_an_event(name, instruction, kind):
    assert trace.kind_of(name, instruction) == kind


# ---- layouts of the backends


def plane_text(name, lines):
    """A plane in proto text; lines: {name: [(event's name, start, end in ns, stats)]}."""
    ids, stat_ids, text = {}, {}, ""
    for line, events in lines.items():
        rows = ""
        for event, start, end, stats in events:
            fields = "".join(
                f'stats {{ metadata_id: {stat_ids.setdefault(key, len(stat_ids) + 1)} str_value: "{value}" }} '
                for key, value in stats.items()
            )
            number = ids.setdefault(event, len(ids) + 1)
            rows += f"events {{ metadata_id: {number} offset_ps: {start}000 duration_ps: {end - start}000 {fields}}} "
        text += f'lines {{ id: {len(text)} name: "{line}" timestamp_ns: 0 {rows}}} '
    for kind, known in (("event", ids), ("stat", stat_ids)):
        for key, number in known.items():
            text += f'{kind}_metadata {{ key: {number} value {{ id: {number} name: "{key}" }} }} '
    return f'planes {{ name: "{name}" {text}}} '


def read(tmp_path, *planes):
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace("".join(planes)))
    return trace.read(path)


HOST = plane_text(
    "/host:CPU",
    {
        "python": [("train", 0, 90, {"step_num": "2"})],
        "worker": [
            ("all-reduce.1", 10, 40, {"hlo_op": "all-reduce.1", "device_ordinal": "3"}),
            ("Rendezvous", 12, 38, {}),
            ("end: all-reduce.1", 40, 41, {}),
            ("while.2", 41, 60, {"hlo_op": "while.2", "device_ordinal": "3"}),
            ("dot.1", 42, 50, {"hlo_op": "dot.1", "device_ordinal": "3"}),
            ("dot.1", 50, 55, {"hlo_op": "dot.1", "device_ordinal": "0"}),
        ],
    },
)


def test_read_cpu_takes_instructions_by_their_device(tmp_path):
    assert read(tmp_path, HOST) == [
        Op("CPU:3", "all_reduce", 10, 40),
        Op("CPU:3", COMPUTE, 42, 50),
        Op("CPU:0", COMPUTE, 50, 55),
    ]


def test_read_gpu_takes_streams_and_leaves_the_host_and_derived_lines(tmp_path):
    lines = {
        "Stream #13(Compute)": [("gemm_kernel", 10, 40, {"hlo_op": "dot.1"})],
        "Stream #14(MemcpyH2D)": [("MemcpyH2D", 5, 15, {})],
        "Stream #15(Compute)": [("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 30, 50, {"hlo_op": "all-reduce-start.1"})],
        "XLA Ops": [("dot.1", 10, 50, {})],
        "Steps": [("2", 0, 60, {})],
    }
    ops = read(tmp_path, HOST, plane_text("/device:GPU:1", lines))
    assert sorted(ops) == [
        Op("GPU:1", "all_reduce", 30, 50),
        Op("GPU:1", COMPUTE, 10, 40),
        Op("GPU:1", COPY, 5, 15),
    ]
    assert trace.split(ops, num_steps=1).exposed_exchange == pytest.approx(10e-9)


def test_read_tpu_takes_what_the_core_does_and_what_is_in_flight(tmp_path):
    lines = {
        "Steps": [("2", 0, 100, {})],
        "XLA Modules": [("jit_train_step", 0, 100, {})],
        "XLA Ops": [
            ("%while.1 = (s32[]) while(%t), body=%b", 0, 90, {}),
            ("%all-gather-start.1 = (bf16[4], bf16[8]) all-gather-start(%p)", 10, 11, {}),
            ("%fusion.1 = bf16[8] fusion(%q)", 11, 40, {}),
            ("%all-gather-done.1 = bf16[8] all-gather-done(%all-gather-start.1)", 40, 48, {}),
            ("%fusion.2 = bf16[8] fusion(%all-gather-done.1)", 48, 80, {}),
        ],
        "Async XLA Ops": [
            ("all-gather-start.1", 10, 48, {}),
            ("slice-start.3", 20, 85, {}),
        ],
    }
    planes = [plane_text(name, lines) for name in ("/device:TPU:0", "/device:TPU:0 SparseCore 0")]
    ops = read(tmp_path, *planes)
    assert {op.device for op in ops} == {"TPU:0"}
    found = trace.split(ops, num_steps=1)
    seconds = [found.step, found.compute, found.exposed_exchange, found.exposed_copy, found.exchange]
    assert seconds == pytest.approx([75e-9, 61e-9, 9e-9, 5e-9, 38e-9])
