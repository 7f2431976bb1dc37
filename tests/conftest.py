"""Before jax starts: 8 virtual CPU devices for every test, shapes checked by beartype, a compile cache."""

import difflib
import gc
import importlib.metadata
import os
import pathlib

# Compiling is most of what the tests do: no LLVM optimisation, and emitters that compile fast where jaxlib has them
# (an unknown flag ends the process).
_XLA_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS)).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
gc.set_threshold(100_000, 20, 100)  # tracing makes millions of objects that live on

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags, logging  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent / "golden"
_LEVEL = logging.get_absl_logger().level
flags.FLAGS.mark_as_parsed()  # Grain reads a flag; without absl.app it would refuse (grain #1355)
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

jaxtyping.install_import_hook("skysense_jax", "beartype.beartype")


@pytest.fixture(autouse=True)
def _no_leaked_mesh():
    """A test that leaves a mesh set would change every test after it."""
    yield
    assert jax.sharding.get_abstract_mesh().empty


@pytest.fixture(autouse=True)
def _same_log_level():
    """Commands turn logging down for their process; here that is the process of every test after them."""
    logging.get_absl_logger().setLevel(_LEVEL)


@pytest.fixture
def errors(monkeypatch):
    """What is logged as an error, from here on."""
    told = []
    monkeypatch.setattr(logging, "error", lambda text, *args, **kwargs: told.append(text % args))
    return told


@pytest.fixture(scope="session")
def emulator():
    """The server that gs://bucket is, one a process: the libraries keep their connections."""
    from emulator import Emulator

    server = Emulator()
    yield server
    server.close()


@pytest.fixture(scope="session")
def browser():
    """A real browser for pages, one a process."""
    from browser import Browser

    with Browser() as running:
        yield running


@pytest.fixture
def matches_golden(request):
    """A function (name, text) that holds the text against tests/golden/NAME.txt, or rewrites that."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--refresh-golden"):
            path.write_text(text)
            return
        saved = path.read_text() if path.exists() else ""
        diff = difflib.unified_diff(
            saved.splitlines(), text.splitlines(), f"golden/{name}.txt", "this code", lineterm=""
        )
        assert saved == text, "\n".join(
            [*diff, "If this is meant: pytest --refresh-golden, with the files of these tests"]
        )

    return compare


# Files that take longest start first, so that no worker of --dist loadfile ends alone with one of them.
_LONG = (
    "test_chain.py",
    "test_train_step.py",
    "test_meshes.py",
    "test_train.py",
    "test_buckets.py",
    "test_from_torch.py",
)


def pytest_collection_modifyitems(items):
    first = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(_LONG)))


def pytest_addoption(parser):
    parser.addoption("--refresh-golden", action="store_true", help="rewrite tests/golden/*.txt from this code")
