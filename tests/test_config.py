"""Every wrong config is refused with a message that names the field, before anything is compiled."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import base, tiny
from skysense_jax import config as config_lib
from skysense_jax import config_checks

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.fixture
def config():
    """tiny, with views that the cases below are written for."""
    config = tiny.get_config()
    config.data.views.update(
        anchor_cells=16, global_box_cells=(10, 15), global_cells=8, local_box_cells=(3, 7), local_cells=4
    )
    return config


def set_field(config, field, value):
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[name] = value


@pytest.mark.parametrize("name", NAMES)
def test_validate_named_config_passes(name):
    config = config_lib.load(ROOT / "configs" / f"{name}.py")
    config_lib.validate(config, num_devices=4)
    assert config.name == name


@pytest.mark.parametrize("name", NAMES)
def test_flat_text_of_named_config_comes_back_as_the_config(name):
    config = config_lib.load(ROOT / "configs" / f"{name}.py")
    again = config_lib.unflatten(config_lib.flat_text(config))
    assert config_lib.flat_text(again) == config_lib.flat_text(config)
    assert again.to_dict() == config.to_dict()


def test_rules_every_field_of_base_has_one_and_every_rule_has_a_field():
    fields = config_checks.fields_of(base.get_config())
    used = {config_checks.rule_for(field).wanted: field for field in fields}
    assert len(used) > 5
    matched = {id(config_checks.rule_for(field)) for field in fields}
    assert {id(rule) for rule in config_checks._RULES.values()} == matched
    with pytest.raises(AssertionError, match="new_field"):
        config_checks.rule_for("new_field")


WRONG = [  # field, value, what the message must say beside "config.FIELD: got VALUE"
    ("optim.learning_rate", "fast", "a number above 0"),
    ("optim.learning_rate", 0.0, "a number above 0"),
    ("optim.learning_rate", float("nan"), "a number above 0"),
    ("optim.num_steps", 1.5, "an integer of 1 or more"),
    ("optim.num_steps", True, "an integer of 1 or more"),
    ("eval.num_train_scenes", 0, "at least 1 with num_test_scenes 24"),
    ("optim.warmup_steps", 301, "at most num_steps, 300"),
    ("optim.final_learning_rate", 0.1, "at most learning_rate, 0.0004"),
    ("optim.beta2", 1.0, "from 0 to below 1"),
    ("run.tensorboard", 1, "True or False"),
    ("run.max_bad_record_share", 1.2, "from 0 to 1"),
    ("efficiency.remat", "all", "one of 'none', 'matmuls', 'blocks'"),
    ("efficiency.attention", "flash", "one of 'auto', 'xla', 'mosaic', 'cudnn', 'cudnn+triton'"),
    ("efficiency.attention", "cudnn", "config.model.compute_dtype 'float32'; wanted 'bfloat16'"),
    ("model.compute_dtype", "float16", "one of 'bfloat16', 'float32'"),
    ("model.backbone.merging", "mean", "one of 'averaged', 'separate'"),
    ("model.backbone.depths", (1, 1, 2), "4 integers of 1 or more"),
    ("model.backbone.depths", (1, 1, 2, 0), "4 integers of 1 or more"),
    ("model.backbone.width", 40, "a multiple of head_width, 32"),
    ("model.fusion.width", 100, "a multiple of head_width, 32"),
    ("model.backbone.num_moe_blocks", 4, "at most 3, the blocks of stages 3 and 4"),
    ("model.backbone.experts_per_token", 9, "at most num_experts, 8"),
    ("model.backbone.head_width", 2, "a multiple of 4"),
    ("model.backbone.drop_path", 1.0, "from 0 to below 1"),
    ("data.modalities", (), "one or more modality names"),
    ("data.modalities", "s2", "a tuple"),
    ("data.sources", (("scenes", 0.0),), "share above 0"),
    ("data.num_dates.s2", 0, "an integer of 1 or more"),
    ("data.views.global_box_cells", (10, 16), "below 16, so that no pixel's ground size changes by 2x"),
    ("data.views.global_box_cells", (4, 15), "sides above 4 and below 16"),
    ("data.views.local_box_cells", (7, 3), "the smallest side first"),
    ("data.views.tile_cells", 5, None),
    ("data.photometric_strength", 3.0, "a number from 0 to 2.5"),
    ("data.scenes.extent_cells", 200, "an integer of 1 to 160"),
    ("eval.first_index", 511, "none of those trained on, 0 to 511"),
    ("eval.datasets", (("eurosat", "eurosat:data"),), "a tuple of (name, dataset, task)"),
    ("eval.datasets", (("a/b", "data", ""),), "the name without /"),
    ("eval.datasets", (("osm", "data", ""),), "the name 'osm' is taken"),
    ("eval.datasets", (("a", "data", ""), ("a", "more", "")), "the name 'a' is taken"),
    ("run.keep_every_hours", 0.0001, "wanted 0, or at least 0.01"),
    ("mesh.data", 0, "1 or more, or -1"),
    ("objective.weights.mgcl", -1.0, "a number of 0 or more"),
]


@pytest.mark.parametrize(("field", "value", "wanted"), WRONG)
def test_validate_wrong_value_names_field_value_and_wanted(config, field, value, wanted):
    set_field(config, field, value)
    with pytest.raises(ValueError, match="wanted") as error:
        config_lib.validate(config)
    lines = str(error.value).splitlines()
    if wanted is None:  # the tile grid is told at the anchor
        assert any("anchor_cells: got 16; wanted a multiple of tile_cells, 5" in line for line in lines)
    else:
        assert any(line.startswith(f"config.{field}: got ") and wanted in line for line in lines), lines


def test_validate_best_checkpoint_wants_something_that_ranks(config):
    config.run.keep_best = True
    with pytest.raises(
        ValueError, match=r"probe_every_steps: got 5000, so that the first probe comes behind step 5000 of"
    ):
        config_lib.validate(config)
    config.eval.probe_every_steps = 201
    config_lib.validate(config)
    config.eval.probe_every_steps = 301
    with pytest.raises(ValueError, match=r"probe_every_steps: got 301, .* behind step 400 of 300"):
        config_lib.validate(config)
    config.eval.probe_every_steps = 0
    with pytest.raises(ValueError, match=r"run.keep_best: got True .* 0; wanted probes"):
        config_lib.validate(config)
    config.eval.update(probe_every_steps=100, num_test_scenes=0)
    with pytest.raises(ValueError, match=r"keep_best: got True; wanted something to probe on"):
        config_lib.validate(config)
    config.eval.datasets = (("fields", "data/fields", "segmentation"),)
    config_lib.validate(config)


def test_validate_box_at_the_limit_passes_and_one_beyond_fails(config):
    config.data.views.update(global_box_cells=(5, 15), global_cells=8)  # 8 / 5 and 15 / 8 are below 2
    config_lib.validate(config)
    config.data.views.update(global_box_cells=(4, 15))
    with pytest.raises(ValueError, match="global_box_cells"):
        config_lib.validate(config)


def test_validate_anchor_smaller_than_global_box_is_refused(config):
    config.data.views.anchor_cells = 8
    with pytest.raises(ValueError, match=r"anchor_cells: got 8; wanted .*global_box_cells's largest, 15, or more"):
        config_lib.validate(config)


def test_validate_several_problems_are_told_together(config):
    set_field(config, "optim.num_steps", -3)
    set_field(config, "data.seed", "x")
    with pytest.raises(ValueError, match="wanted") as error:
        config_lib.validate(config)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "config.data.seed",
        "config.optim.num_steps",
    ]


def test_validate_unknown_modality_is_refused(config):
    config.data.modalities = ("s2", "s3")
    with pytest.raises(ValueError, match=r"config.data.modalities: got \('s2', 's3'\)"):
        config_lib.validate(config)


def test_validate_modality_without_dates_is_refused(config):
    del config.data.num_dates["s1"]
    with pytest.raises(ValueError, match=r"config.data.num_dates.s1: missing"):
        config_lib.validate(config)
    config.data.modalities = ("hr", "s2")  # who does not use it need not draw it
    config_lib.validate(config)


def test_validate_dates_of_unknown_modality_are_refused(config):
    config.data.num_dates.s3 = 2
    with pytest.raises(ValueError, match=r"config.data.num_dates.s3: no such modality"):
        config_lib.validate(config)


LIDAR = dict(
    name="lidar",
    bands=("height",),
    dtype="float32",
    unit="metres above ground",
    value_range=(-10, 200),
    typical_range=(-5, 100),
    wrong_unit_hint="centimetres",
    pixels_per_cell=8,
    patch=2,
    mean=(4,),
    std=(6.0,),
    statistics_source="none",
)


def test_validate_new_modality_row_passes(config):
    config.data.new_modalities = (LIDAR,)
    config.data.modalities = ("lidar", "s2")
    config.data.num_dates.lidar = 1
    config_lib.validate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(patch=3), "wanted pixels_per_cell = patch"),
        (dict(patch=0), "a patch of 1 or more"),
        (dict(bands=()), "one band or more"),
        (dict(value_range=(200, -10)), "the lower value first"),
        (dict(codec="jpg"), "codec 'jpg'; wanted one of"),
        (dict(codec="jpeg"), "codec 'jpeg' holds 3 bands of uint8, got 1 of float32"),
        (dict(name="fused"), "modality 'fused': wanted .* none of"),
        (dict(name="a/b"), "modality 'a/b': wanted letters"),
        (dict(name="s2"), "already a row of the table"),
        (dict(patches=2), "unexpected keyword argument 'patches'"),
    ],
)
def test_validate_wrong_new_modality_row_is_refused(config, change, message):
    config.data.new_modalities = ({**LIDAR, **change},)
    with pytest.raises(ValueError, match=message) as error:
        config_lib.validate(config)
    assert "modalit" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.num_dates.s2", 3, "num_dates: got 6 over .* wanted an odd number"),
        ("data.views.local_cells", 5, "local_cells: got 5; wanted an even number"),
        ("model.backbone.num_prompts", 3, "num_prompts: got 3; wanted an even number"),
        ("model.fusion.head_width", 4, "fusion.head_width: got 4; wanted 8, 16, "),
    ],
)
def test_validate_cudnn_shapes_are_checked(config, field, value, message):
    config.efficiency.attention, config.model.compute_dtype = "cudnn", "bfloat16"
    config.data.num_dates.update(s2=2, hr=1, s1=2)
    config_lib.validate(config)
    set_field(config, field, value)
    with pytest.raises(ValueError, match=message):
        config_lib.validate(config)


def test_validate_batch_that_the_mesh_does_not_divide_is_refused(config):
    config.data.batch_size = 12
    config.mesh.update(data=2, fsdp=2, expert=1, tensor=2)
    config_lib.validate(config, num_devices=8)
    config.mesh.update(data=-1, fsdp=2, tensor=1)
    with pytest.raises(ValueError, match="got 12; wanted a multiple of 8, the product of the mesh axes data 4, fsdp 2"):
        config_lib.validate(config, num_devices=8)
    config.mesh.update(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="at most one -1"):
        config_lib.validate(config, num_devices=8)


def test_validate_no_objective_is_refused(config):
    config.objective.weights.update(mgcl=0.0, qsacl=0.0, text_alignment=0.0)
    with pytest.raises(ValueError, match=r"config.objective.weights: got 0 for mgcl, qsacl, text_alignment"):
        config_lib.validate(config)
    config.objective.weights.update(mgcl=1.0)
    config.objective.mgcl.update(pixel_weight=0.0, object_weight=0.0, image_weight=0.0)
    with pytest.raises(ValueError, match=r"config.objective.mgcl: got 0 for pixel_weight"):
        config_lib.validate(config)


def test_validate_text_table_of_another_width_or_classes_is_refused(config, tmp_path):
    config.model.text_dim = 512
    with pytest.raises(ValueError, match=r"embeddings of width 384; wanted 512: set config.model.text_dim"):
        config_lib.validate(config)
    config.model.text_dim = 2
    path = tmp_path / "other.npz"
    np.savez(path, classes=np.array(["cat", "dog"]), embeddings=np.ones((2, 2), np.float32))
    config.objective.text_table = str(path)
    with pytest.raises(ValueError, match=r"config.objective.text_table: .*classes \('cat', 'dog'\); wanted \('water'"):
        config_lib.validate(config)
    config.objective.text_table = str(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match=r"nowhere.npz is no file; .*text_alignment = 0 needs no table"):
        config_lib.validate(config)
    config.objective.weights.text_alignment = 0.0  # then nobody reads it
    config_lib.validate(config)


def test_validate_unknown_key_names_the_nearest(config):
    config.optim.learning_rat = 1.0
    with pytest.raises(
        ValueError, match=r"config.optim.learning_rat: no such key; did you mean config.optim.learning_rate\?"
    ):
        config_lib.validate(config)


def test_validate_unknown_section_is_told_once(config):
    config.optimizer = dict(learning_rate=1.0, momentum=0.9)
    with pytest.raises(ValueError, match="did you mean") as error:
        config_lib.validate(config)
    assert str(error.value) == "config.optimizer: no such key; did you mean config.optim?"


def test_validate_missing_key_and_section_are_told(config):
    del config.optim["beta1"]
    del config.data["views"]
    with pytest.raises(ValueError, match="missing") as error:
        config_lib.validate(config)
    fields = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert fields == ["config.data.views", "config.optim.beta1"]


def test_validate_value_where_a_section_belongs_is_refused(config):
    set_field(config, "data.views", 3)
    with pytest.raises(ValueError, match=r"config.data.views: got 3; wanted a section"):
        config_lib.validate(config)


def test_load_missing_file_names_the_known_configs():
    with pytest.raises(ValueError, match=r"'configs/tinny.py', which is no file; wanted configs/NAME.py.*'tiny'"):
        config_lib.load("configs/tinny.py")


def test_load_path_and_module_agree_and_are_locked():
    from_path, from_module = config_lib.load("configs/tiny.py"), config_lib.load(tiny)
    assert config_lib.flat_text(from_path) == config_lib.flat_text(from_module)
    with pytest.raises(AttributeError):
        from_path.optim.learning_rat = 1.0


def with_argument(tmp_path):
    path = tmp_path / "with_argument.py"
    path.write_text(
        "from configs import tiny\n\n\ndef get_config(width='32'):\n    config = tiny.get_config()\n"
        "    config.model.backbone.width = int(width)\n    return config\n"
    )
    return path


def test_load_path_with_argument_gives_it_to_the_file(tmp_path):
    path = with_argument(tmp_path)
    assert config_lib.load(f"{path}:64").model.backbone.width == 64
    assert config_lib.load(path).model.backbone.width == 32


# ---- the command line, as users call it

SCRIPT = """
from absl import app
from skysense_jax import config

CONFIG = config.define_flag()

def main(argv):
    data = CONFIG.value.data
    print("rate", CONFIG.value.optim.learning_rate, "dates", data.num_dates.s2, data.modalities)

app.run(main, flags_parser=config.parse_flags)
"""


def run_script(tmp_path, *args, cwd=ROOT):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), *args],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_line_overrides_reach_the_config_from_any_directory(tmp_path):
    args = ("--config.optim.learning_rate=1e-4", "--config.data.num_dates.s2=3", "--config.data.modalities=('s2',)")
    done = run_script(tmp_path, "--config=configs/tiny.py", *args, cwd=tmp_path)
    assert done.stdout == "rate 0.0001 dates 3 ('s2',)\n", done.stderr
    assert done.returncode == 0


def test_command_line_config_with_argument_is_checked_and_used(tmp_path):
    done = run_script(tmp_path, f"--config={with_argument(tmp_path)}:64", "--config.optim.learning_rate=0.5")
    assert done.stdout.startswith("rate 0.5 "), done.stderr
    done = run_script(tmp_path, f"--config={with_argument(tmp_path)}:64", "--config.optim.learning_rat=0.5")
    assert "did you mean config.optim.learning_rate?" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--config=configs/tiny.py", "--config.optim.learning_rat=1"),
            "--config.optim.learning_rat: no such key; did you mean config.optim.learning_rate?",
        ),
        (
            ("--config", "configs/tiny.py", "--noconfig.run.tensorbord"),
            "--config.run.tensorbord: no such key; did you mean config.run.tensorboard?",
        ),
        (
            ("--config=configs/tiny.py", "--config.learning_rate=1"),
            "--config.learning_rate: no such key; did you mean config.optim.learning_rate?",
        ),
        (("--config=configs/tiny.py", "--config.optim.num_steps=1.5"), "--config.optim.num_steps=1.5: invalid literal"),
        (("--config=configs/tinny.py",), "which is no file; wanted configs/NAME.py"),
        (("--config.optim.num_steps=1",), "wanted --config=FILE before it"),
        (
            ("--config=configs/tiny.py", "--cofnig.optim.num_steps=1"),
            "Unknown command line flag 'cofnig.optim.num_steps'",
        ),
    ],
)
def test_command_line_mistake_ends_with_one_clear_message(tmp_path, args, message):
    done = run_script(tmp_path, *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Nothing was started" in done.stderr
    assert done.stdout == ""


# ---- text, fingerprints, resuming


def test_flat_text_is_sorted_and_does_not_depend_on_the_order_of_keys(config):
    lines = config_lib.flat_text(config).splitlines()
    assert lines == sorted(lines)
    assert "data.views.global_box_cells = (10, 15)" in lines
    first, second = (dict(reversed(LIDAR.items())), LIDAR)
    texts = []
    for row in (first, second):
        config.data.new_modalities = (row,)
        texts.append(config_lib.flat_text(config))
    assert texts[0] == texts[1]


def test_fingerprint_changes_with_the_model_and_not_with_the_run(config):
    before = config_lib.fingerprint(config)
    config.run.log_every_steps = 7
    config.data.views.num_local = 2
    assert config_lib.fingerprint(config) == before
    config.model.fusion.depth += 1
    assert config_lib.fingerprint(config) != before


def test_fingerprint_of_a_section_ignores_a_section_with_the_same_beginning(config):
    config.name = "other"
    before = config_lib.fingerprint(config, ("data.seed",))
    config.data.scenes.seed = 5
    assert config_lib.fingerprint(config, ("data.seed",)) == before
    assert config_lib.fingerprint(config, ("data",)) != before


def test_compare_same_config_finds_nothing(config):
    assert config_lib.compare(config_lib.flat_text(config), config) == config_lib.Changes((), ())


def test_compare_tells_what_is_refused_from_what_is_allowed(config):
    saved = config_lib.flat_text(config)
    config.model.backbone.width = 64
    config.model.backbone.drop_path = 0.1
    config.data.modalities = ("s2",)
    config.optim.num_steps = 200
    config.objective.weights.koleo = 0.5
    changes = config_lib.compare(saved, config)
    assert changes.refused == (
        "config.data.modalities: ('hr', 's2', 's1') -> ('s2',)",
        "config.model.backbone.width: 32 -> 64",
    )
    assert changes.allowed == (
        "config.model.backbone.drop_path: 0.0 -> 0.1",
        "config.objective.weights.koleo: 0.0 -> 0.5",
        "config.optim.num_steps: 300 -> 200",
    )


def test_compare_a_field_that_came_later_is_told(config):
    saved = "".join(f"{line}\n" for line in config_lib.flat_text(config).splitlines() if "num_prompts" not in line)
    assert config_lib.compare(saved, config).refused == ("config.model.backbone.num_prompts: not there -> 4",)
    saved = "".join(f"{line}\n" for line in config_lib.flat_text(config).splitlines() if "backbone.shared" not in line)
    assert config_lib.compare(saved, config).refused == ()  # such a run had what is now the default
    config.model.backbone.shared = False
    assert config_lib.compare(saved, config).refused == ("config.model.backbone.shared: True -> False",)
