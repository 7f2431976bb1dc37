"""The laws of the house, read from the source: who imports whom, who reads a config, how long things are."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax import cost, sharding
from skysense_jax.losses import contrastive, matching, mgcl
from skysense_jax.modalities import RESERVED_NAMES, select
from skysense_jax.models import attention, heads, skysense
from skysense_jax.models.backbone import Backbone

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "skysense_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SECTIONS = ("run", "mesh", "efficiency", "parts", "data", "model", "objective", "optim", "eval")

# What a room may import of the project; a room that is not here may import anything but what NEVER says.
ALLOWED = {
    "modalities": set(),
    "chips": set(),
    "sharding": set(),
    "trees": set(),
    "storage": set(),
    "batch": set(),
    "data": {"modalities", "storage"},
    "kernels": set(),
    "models": {"kernels", "modalities", "sharding", "batch"},
    "losses": set(),
    "photometric": {"batch", "modalities"},
    "metrics": {"storage"},
    "measure": {"chips"},
    "trace": set(),
    "profiling": {"trace"},
    "digests": {"trees"},
    "manifest": {"storage"},
    "restore": {"digests", "manifest", "storage", "trees"},
    "checkpoint": {"digests", "manifest", "restore", "storage", "trees"},
    "watch": set(),
    "monitor": {"data", "measure", "metrics", "watch"},
    "optim": {"trees"},
    "config_layout": {"sharding"},
    "config_eval": {"modalities", "data"},
    "config_objective": {"modalities", "data"},  # data/text: the table that a config names
    "config_checks": {"config_eval", "config_layout", "config_objective", "modalities", "data"},
    "config": {"config_checks"},
    "drawing": {"modalities"},
    "page": set(),
    "eval": {"batch", "data", "drawing", "metrics", "modalities", "models", "photometric", "sharding"},
    "cost": {"modalities"},
    "feed": {"batch", "data", "sharding"},
    "dry_run": {"batch", "cost", "modalities"},
    "parameters": {"optim", "sharding", "trees"},
    "train_state": {"batch", "compiler", "models", "sharding"},
    "sides": {"batch", "losses", "modalities", "models", "photometric"},
    "train_step": {"batch", "losses", "modalities", "models", "photometric", "sides", "train_state"},
    "distil": {"checkpoint", "config", "digests", "dry_run", "modalities", "models", "sharding", "storage"},
    "ingest": {"data", "drawing", "modalities", "page", "storage"},
    "assembly": {
        "batch",
        "config",
        "config_layout",
        "cost",
        "data",
        "distil",
        "dry_run",
        "modalities",
        "models",
        "norms",
        "optim",
        "train_state",
        "train_step",
    },
    "norms": {"batch", "sharding", "train_state", "train_step", "trees"},
    "outputs": {"assembly", "batch", "data", "eval", "metrics", "sharding", "tasks", "train_state"},
    "resume": {"checkpoint", "config", "data", "distil", "launch", "monitor", "storage", "train_state"},
    "launch": {"config", "sharding", "storage"},
    "preflight": {"config", "launch", "storage"},
    "targets": {"chips"},
    "plan": {"assembly", "chips", "config", "dry_run", "modalities", "sharding", "targets", "train_state"},
    "tasks": {
        "assembly",
        "batch",
        "checkpoint",
        "config",
        "data",
        "drawing",
        "eval",
        "export",
        "ingest",  # tfds_sets only
        "modalities",
        "models",
        "optim",
        "photometric",
        "sharding",
        "storage",
        "train_state",
        "trees",
    },
    "explain": {
        "assembly",
        "data",
        "drawing",
        "eval",
        "metrics",
        "modalities",
        "models",
        "page",
        "parameters",
        "photometric",
        "storage",
        "tasks",  # loading only
    },
    "export": {
        "assembly",
        "checkpoint",
        "config",
        "config_checks",
        "data",
        "metrics",
        "modalities",
        "models",
        "sharding",
        "storage",
        "train_state",
        "trees",
    },
}
# Thin commands inside of rooms that may not import what they start.
COMMANDS = {"eval/__main__.py": {"tasks"}, "eval/report.py": {"explain", "storage"}}
# Who may import these; they stand beside or above everything else.
ONLY_BY = {
    "train": set(),
    "ingest": {"tasks"},
    "export": {"tasks"},
    "tasks": {"explain", "outputs"},
    "explain": set(),
    "plan": set(),
    "preflight": set(),
    "outputs": {"train"},
    "resume": {"train"},
    "assembly": {"train", "outputs", "explain", "export", "plan", "tasks"},
    "distil": {"assembly", "resume"},
    "config": {"train", "assembly", "distil", "export", "launch", "plan", "preflight", "resume", "tasks"},
    "launch": {"train", "preflight", "resume"},
    "train_step": {"train", "assembly", "norms"},
}
# Beside benchmarks and tests.
CONFIG_READERS = {
    "config.py",
    "config_checks.py",
    "config_layout.py",
    "config_eval.py",
    "config_objective.py",
    "assembly.py",
    "distil.py",
    "explain/loading.py",
    "train.py",
    "export/__main__.py",
    "export/from_torch.py",
    "launch/start.py",
    "outputs.py",
    "plan/__main__.py",
    "preflight.py",
    "resume.py",
    "tasks/loading.py",
}
# Copied into exported directories: one file that needs no other of ours, and one that imports it from beside it, as
# transformers wants of code that it loads.
MODELING, WRAPPER = "export/modeling_skysensev2.py", "export/hf_skysensev2.py"
LOSSES_MAY_IMPORT = {"jax", "jaxtyping", "einops", "numpy", "math", "collections", "typing", "functools", "dataclasses"}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of all that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or name_of(path) == WRAPPER, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: pathlib.Path) -> set[str]:
    names = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in names if parts[0] == "skysense_jax" and len(parts) > 1} - {
        room_of(path),
        "__version__",
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    room, used = room_of(path), rooms_imported(path) - COMMANDS.get(name_of(path), set())
    if room in ALLOWED:
        assert used <= ALLOWED[room], f"{name_of(path)} imports {sorted(used - ALLOWED[room])}"
    for target in used & set(ONLY_BY):
        assert room == target or room in ONLY_BY[target], f"{name_of(path)} imports {target}, which stands above it"
    if room == "explain":
        assert {name for name in imports(path) if ".tasks." in name} <= {"skysense_jax.tasks.loading"}
    if room == "tasks":
        ours = {name for name in imports(path) if name.startswith("skysense_jax.ingest.")}
        assert all(name.startswith("skysense_jax.ingest.tfds_sets.") for name in ours), sorted(ours)


def test_pytorch_side_needs_neither_jax_nor_this_project():
    for path in sorted((PACKAGE / "export").glob("*.py")):
        used = {name.split(".")[0] for name in imports(path)}
        ours = {name for name in imports(path) if name.startswith("skysense_jax")}
        if name_of(path) == MODELING:
            assert used - set(sys.stdlib_module_names) == {"torch", "safetensors"}
        elif name_of(path) == WRAPPER:
            assert used - set(sys.stdlib_module_names) == {"transformers", "modeling_skysensev2"}
        elif "torch" in used and name_of(path) not in CONFIG_READERS:  # embedding, ONNX
            assert not used & {"jax", "flax", "orbax", "transformers"}, name_of(path)
            assert {name.split(".")[1] for name in ours} <= {"export", "modalities"}, name_of(path)


@pytest.mark.parametrize("path", sorted((PACKAGE / "losses").glob("*.py")), ids=name_of)
def test_losses_import_jax_and_losses_only(path):
    others = {name.split(".")[0] for name in imports(path) if not name.startswith("skysense_jax.losses")}
    assert others <= LOSSES_MAY_IMPORT, f"{name_of(path)} imports {sorted(others - LOSSES_MAY_IMPORT)}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_config_is_read_in_entry_points_only(path):
    text = path.read_text()
    # A default where a field is read hides a typo, and stands in two places.
    assert not re.search(r"\bconfig(\.\w+)*\.get\(", text), f"{name_of(path)}: config.get("
    if name_of(path) in CONFIG_READERS:
        return
    assert not {name for name in imports(path) if name.split(".")[0] == "ml_collections"}
    read = {
        f"config.{node.attr}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
        if node.attr in SECTIONS
    }
    assert not read, f"{name_of(path)} reads {sorted(read)}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    limit = 800 if name_of(path) == MODELING else 420
    assert len(text.splitlines()) <= limit, f"{name_of(path)}: {len(text.splitlines())} lines; it holds two things"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 250 if name_of(path) == "train.py" and node.name in ("main", "train") else 90
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{name_of(path)}: {node.name} has {length} lines; wanted at most {limit}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text().strip()], ids=name_of)
def test_modules_say_what_they_are_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


# ---- what two rooms need and neither may import from the other is written twice, and equal


def test_losses_and_models_agree_where_they_may_not_share():
    assert mgcl.GRANULARITIES == skysense.GRANULARITIES
    rows = np.random.default_rng(0).normal(size=(4, 3)) * [[0], [1e-8], [1], [1e8]]
    np.testing.assert_array_equal(contrastive.unit(jnp.asarray(rows)), heads.unit(jnp.asarray(rows)))
    np.testing.assert_array_equal(matching.token_offsets(3, 5), attention.token_offsets((3, 5), (3, 5)))


def test_no_modality_takes_a_name_that_pytorch_or_the_embedding_needs():
    # asked of a fresh process: libraries that other tests import add attributes of their own to every module
    code = "from torch import nn; print(*dir(nn.ModuleDict()), *dir(nn.ParameterDict()))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    taken = set(asked.stdout.split())
    assert "named_parameters" in taken
    flags = set(re.findall(r'"--(\w+)"', (PACKAGE / "export" / "embed.py").read_text()))
    assert len(flags) > 5
    assert {name for name in taken | flags if not name.startswith("_")} <= RESERVED_NAMES


@pytest.mark.parametrize("moe_from", ["end", "start"])
@pytest.mark.parametrize("num_moe_blocks", range(7))
def test_network_and_cost_formula_agree_on_which_blocks_are_mixtures(num_moe_blocks, moe_from):
    depths = (1, 2, 4, 2)
    form = dict(num_moe_blocks=num_moe_blocks, moe_from=moe_from)
    network = Backbone(modalities=select(("s2",)), width=32, depths=depths, **form)
    of_network = tuple(network._segment_depths(stage)[1] for stage in (3, 4))
    assert (0, 0, *of_network) == cost.moe_depths(depths, num_moe_blocks, moe_from)


# ---- logical axes: flax replicates an unknown name without a word

TAKES_AXES = {"partitioned", "constrain", "with_logical_partitioning", "with_logical_constraint", "Partitioned"}


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=name_of)
def test_logical_axes_are_constants_with_a_rule(path):
    rules, tree = dict(sharding.LOGICAL_AXIS_RULES), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        axes = [keyword.value for keyword in node.keywords if keyword.arg in ("axes", "names")]
        axes += node.args if called(node) in TAKES_AXES else []
        literals = [part.value for axis in axes for part in ast.walk(axis) if isinstance(part, ast.Constant)]
        literals = [value for value in literals if isinstance(value, str)]
        assert not literals, f"{name_of(path)} line {node.lineno}: {literals} instead of a constant of sharding.py"
    used = {name.rpartition(".")[2] for name in imports(path) if name.startswith("skysense_jax.sharding.")}
    for constant in used - {"LOGICAL_AXIS_RULES"}:
        if constant.isupper():
            assert getattr(sharding, constant) in rules, f"{name_of(path)}: {constant} has no rule"


def test_every_axis_constant_has_a_rule_and_every_rule_names_mesh_axes():
    constants = {value for name, value in vars(sharding).items() if name.isupper() and isinstance(value, str)}
    rules = dict(sharding.LOGICAL_AXIS_RULES)
    assert constants == set(rules)
    assert len(sharding.LOGICAL_AXIS_RULES) == len(rules)
    for axes in rules.values():
        named = () if axes is None else (axes,) if isinstance(axes, str) else axes
        assert set(named) <= set(sharding.MESH_AXES)


# ---- where the code runs

TEXT_FILES = [
    path
    for folder in ("skysense_jax", "configs", "tests", "benchmarks", "docs", "launch")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".sh", ".txt", ".toml", ".yaml", ".json", ".sbatch")
]
MACHINE_PATH = re.compile("(?<![\\w.])/(" + "|".join(("work", "home", "root", "Users")) + ")/")


@pytest.mark.parametrize("folder", ["skysense_jax", "benchmarks", "tests", "configs"])
def test_names_taken_from_our_modules_exist(folder):
    """``module.name`` of a module of ours that a file imports: benchmarks are run seldom and would break unseen."""
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree, ours = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("skysense_jax", "benchmarks"):
                source = importlib.import_module(node.module)
                for alias in node.names:
                    value = getattr(source, alias.name, None)
                    if value is None:  # a module that nobody has imported yet, or nothing at all
                        try:
                            value = importlib.import_module(f"{node.module}.{alias.name}")
                        except ModuleNotFoundError:
                            missing.append(f"{path.name}: {node.module}.{alias.name}")
                    if isinstance(value, types.ModuleType):
                        ours[alias.asname or alias.name] = value
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
            name = node.value.id if isinstance(node.value, ast.Name) else None
            if name in ours and name not in stored and not hasattr(ours[name], node.attr):
                missing.append(f"{path.name}:{node.lineno}: {name}.{node.attr}")
    assert not missing


def test_no_two_test_modules_have_one_name():
    """pytest puts every folder of the tests on the path: of two helpers with one name, one hides the other."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_no_machine_paths_in_the_repository():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXT_FILES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def test_data_modules_do_not_import_jax():
    modules = []
    for path in sorted((PACKAGE / "data").rglob("*.py")):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"jax", "flax", "torch"}, f"{name_of(path)} imports {sorted(used)}"
        if "grain" not in used and path.name != "make_table.py":  # Grain itself imports jax
            modules.append(".".join(path.with_suffix("").relative_to(ROOT).parts).removesuffix(".__init__"))
    assert len(modules) > 5
    code = (
        "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m); assert 'jax' not in sys.modules, m"
    )
    subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, timeout=60, check=True)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_that_could_run_code_of_a_file_is_loaded(path):
    """No pickle, whatever library offers it."""
    text = path.read_text()
    assert not imports(path) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert "allow_pickle=True" not in text
    assert text.count("torch.load(") == text.count("weights_only=True")
