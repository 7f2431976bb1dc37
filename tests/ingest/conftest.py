"""A folder of samples, made up and (where SKYSENSE_REALDATA names it) real, converted once for all tests."""

import dataclasses
import os
import pathlib

import fabricate
import pytest

from configs import real_mix
from skysense_jax.data.records import RecordSource
from skysense_jax.data.sample import Sample
from skysense_jax.ingest import samples
from skysense_jax.modalities import Modality, select

REAL = os.environ.get("SKYSENSE_REALDATA")
SOURCES = ["made_up", "real"] if REAL else ["made_up"]


@dataclasses.dataclass(frozen=True)
class Converted:
    source: pathlib.Path
    out: pathlib.Path
    report: samples.Report
    rows: tuple[Modality, ...]
    samples: dict[str, list[Sample]]  # per kind, read back from the records
    real: bool


def rows() -> tuple[Modality, ...]:
    config = real_mix.get_config()
    return select(config.data.modalities, config.data.new_modalities)


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("made_up")
    fabricate.write_all(root)
    return root


@pytest.fixture(scope="session", params=SOURCES)
def converted(request, tmp_path_factory, made_up) -> Converted:
    real = request.param == "real"
    source = pathlib.Path(REAL) if real else made_up
    out = tmp_path_factory.mktemp("records") / "mix"
    report = samples.convert(source, out, modalities=rows())
    read = {}
    for kind in report.kinds:
        paths = sorted(out.glob(f"{kind}-*.array_record"))
        records = RecordSource(paths, rows()) if paths else []
        read[kind] = [records[i].decode() for i in range(len(records))]
    return Converted(source=source, out=out, report=report, rows=rows(), samples=read, real=real)
