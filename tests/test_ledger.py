"""The ledger of blocks: its enumeration of a step against the formula, and kept rows of a real chip made again."""

import importlib.metadata
import pathlib

import pytest

from benchmarks import ledger
from skysense_jax import assembly, modalities, targets
from skysense_jax import config as config_lib
from skysense_jax.plan import forecast

ROOT = pathlib.Path(__file__).parents[1]
KEPT = ROOT / "docs" / "ledger" / "huge_v5p.txt"
LIBTPU = "0.0.42.1"  # of the kept rows


@pytest.mark.parametrize("qsacl", [1.0, 0.0])  # off: the teacher sees no local view
@pytest.mark.parametrize(("name", "share"), [("tiny", 0.8), ("base", 0.9), ("huge", 0.95), ("huge_moe", 0.95)])
def test_blocks_of_a_step_do_the_work_that_the_formula_counts(name, share, qsacl):
    """All but heads, merging, tokenizers and queries."""
    config = config_lib.load(f"{ROOT}/configs/{name}.py")
    config.objective.weights.qsacl = qsacl
    rows = modalities.select(config.data.modalities, config.data.new_modalities)
    blocks = ledger.of_step(config, samples=config.data.batch_size, platform="tpu")
    counted = sum((3 * block.student + block.teacher) * block.ideal for block in blocks)
    assert share < counted / assembly.batch_flops(config, rows) < 1


@pytest.mark.parametrize(
    ("block", "most_gib"),
    [
        ("swin 352, 128 x 128, shifted, mosaic", 9.0),
        ("swin 704, 64 x 64, shifted, mosaic", 4.5),
        ("global 1408, 32 x 32 + 4, mosaic", 5.0),
        ("fusion 1024, 256 cells of 14, mosaic", 6.0),
    ],
)
def test_block_of_huge_on_a_v5p_costs_what_is_kept(block, most_gib):
    """Made again by the chip's compiler, and the row compared as text where the compiler is the one that made it."""
    config, target = config_lib.load(f"{ROOT}/configs/huge.py"), targets.parse("v5p:4")
    device = forecast.make_mesh(target, dict(data=4, fsdp=1, tensor=1, expert=1)).devices.flat[0]
    of_names = {b.name: b for b in ledger.comparison(config, images=8, side=128, platform="tpu")}
    line = ledger.row(of_names[block], device=device, chip=target.chip)
    assert float(line[46:].split()[1]) < most_gib
    if importlib.metadata.version("libtpu") == LIBTPU:
        assert line in KEPT.read_text().splitlines()
