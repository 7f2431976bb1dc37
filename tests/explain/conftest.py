"""Two saved runs with random weights: a mixture of experts with three modalities, and a dense one of one modality."""

import pathlib

import pytest

from skysense_jax.data.scenes import SceneSource, write_records
from tests.export.saved import export_config, save_run
from tests.nano import get_config


@pytest.fixture(scope="session")
def mixture_run(tmp_path_factory) -> pathlib.Path:
    """Of hr, s2 and s1, on scenes; with metrics and a probe."""
    workdir = tmp_path_factory.mktemp("mixture") / "run"
    workdir.mkdir()
    save_run(workdir, export_config())
    return workdir


def dense_config(records: pathlib.Path):
    """Of s1 alone, on records."""
    config = get_config()
    config.data.sources = ((f"{records}/*.array_record", 1.0),)
    return config


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory) -> pathlib.Path:
    """On eight scenes that were written as records, with what archives lack; without metrics."""
    folder = tmp_path_factory.mktemp("dense")
    source = SceneSource(num_scenes=8, extent_cells=5, modalities=("s1",))
    write_records(source, folder / "records", scenes_per_shard=4, num_processes=1)
    workdir = folder / "<run>"
    workdir.mkdir()
    save_run(workdir, dense_config(folder / "records"))
    (workdir / "metrics.jsonl").unlink()
    (workdir / "probe.json").unlink()
    return workdir
