"""What stands beside the shards is written from their parts one by one, and says what one table of all would."""

import json
import pathlib
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from skysense_jax.ingest import folder, index
from skysense_jax.ingest.acquisitions import Rejected
from skysense_jax.ingest.histograms import Histograms
from skysense_jax.modalities import MODALITIES, OSM

ROWS = tuple(MODALITIES.values())
PER_ROW = ("dates", "hidden", "missing")


def _sample(rng, shard, record):
    seen = [row.name for row in ROWS if rng.random() < 0.7]
    dated = rng.random() < 0.8
    return dict(
        id=f"{shard.name}/{record}",
        split=shard.split,
        shard=shard.name,
        record=record,
        longitude=float(rng.uniform(-180, 180)) if rng.random() < 0.9 else None,
        latitude=float(rng.uniform(-80, 84)) if rng.random() < 0.9 else None,
        dates={name: int(rng.integers(1, 9)) for name in seen},
        hidden={name: float(rng.random()) for name in seen},
        **(
            {} if record == 1 else dict(missing={name: float(rng.random()) for name in seen})
        ),  # of an older build: none
        first_day=int(rng.integers(15_000, 16_000)) if dated else None,
        last_day=int(rng.integers(16_000, 19_000)) if dated else None,
        classes=rng.integers(0, 99, OSM.num_classes + 1).tolist() if rng.random() < 0.5 else None,
        licence="CC0-1.0",
    )


class Nothing(folder.Maker):
    """Whose shards are made already."""

    rows, sources = ROWS, (dict(name="a", kind="image", licence="CC0-1.0"),)

    def __init__(self, shards):
        self.shards = shards

    def rejected(self):
        yield Rejected("file", "a/x", "no")

    def made(self, shard):
        raise NotImplementedError


def _parts(out, num, size=7):
    """Makes a folder with the parts of that many shards: their maker and samples."""
    (out / folder.PARTS).mkdir(parents=True)
    rng, samples = np.random.default_rng(3), []
    of = dict(train=num - num // 3, validation=num // 3)
    made = [folder.Shard(split, i, of[split], 0, 0) for split in of for i in range(of[split])]
    for number, shard in enumerate(made):
        some = [_sample(rng, shard, record) for record in range(0 if number % 5 == 0 else size)]
        rejected = [dict(what="date", name=f"{shard.name} s2: {i}", reason="clouds") for i in range(number % 3)]
        part = out / folder.PARTS / f"{shard.name}.json"
        counts, figured = pathlib.Path(part.with_suffix(".npz")), pathlib.Path(part.with_suffix(".parquet"))
        Histograms(ROWS).save(counts)
        figured.touch()
        part.write_text(json.dumps(dict(bytes=[0, counts.stat().st_size, 0], samples=some, rejected=rejected)))
        samples += some
    return Nothing(made), samples


def test_index_card_and_rejects_are_those_of_all_samples_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_ROW_GROUP", 20)
    out = epath.Path(tmp_path)
    maker, samples = _parts(out, 31)
    table = folder.finish(maker, out)
    columns = {f"{key}_{row.name}": [s.get(key, {}).get(row.name) for s in samples] for key in PER_ROW for row in ROWS}
    plain = [key for key in samples[0] if key not in PER_ROW]
    file = pq.ParquetFile(out / "index.parquet")
    assert file.read().equals(pa.table({key: [s[key] for s in samples] for key in plain} | columns))
    assert {file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups - 1)} == {21}
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 1 + sum(number % 3 for number in range(31))
    assert table.splitlines()[-1] == f"rejected: {len(rejected) - 1} dates, 1 files"
    of_train = [s for s in samples if s["split"] == "train"]
    cells = [len(of_train), *(sum(s["dates"].get(row.name, 0) for s in of_train) for row in ROWS)]
    cells.append(sum(s["classes"] is not None for s in of_train))
    assert table.splitlines()[1].split() == ["train", *map(str, cells)]
    card = (out / "README.md").read_text()
    longitudes, latitudes = ([s[key] for s in samples if s[key] is not None] for key in ("longitude", "latitude"))
    last = np.datetime64(max(s["last_day"] or 0 for s in samples), "D")
    hidden, missing = ([s[key]["s2"] for s in samples if "s2" in s.get(key, {})] for key in ("hidden", "missing"))
    dates = sum(s["dates"].get("s2", 0) for s in samples)
    assert 0 < len(missing) < len(hidden)
    total = np.sum([s["classes"] for s in samples if s["classes"]], axis=0)
    for wanted in (
        f"- {len(samples)} samples: {len(of_train)} train, {len(samples) - len(of_train)} validation",
        f"between {min(longitudes):.4f} and {max(longitudes):.4f} degrees east, {min(latitudes):.4f} and",
        f"to {last}",
        f"- {len(rejected)} files, dates and places came to nothing",
        "| row | unit | pixel | samples | dates | dates left out | under cloud | no data |",
        f"| 10 m | {len(hidden)} | {dates} | {len(rejected) - 1} | {np.mean(hidden):.1%} | {np.mean(missing):.1%} |",
        f"| water | {total[1] / total.sum():.2%} |",
    ):
        assert wanted in card, card
    assert not list(out.glob("*incomplete*"))


def test_memory_of_the_end_does_not_grow_with_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_ROW_GROUP", 50)
    peaks = []
    for num in (20, 200):
        out = epath.Path(tmp_path / str(num))
        maker, _ = _parts(out, num)
        folder.finish(maker, out)  # what is allocated once
        tracemalloc.start()
        folder.finish(maker, out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_build_without_a_sample_says_why_and_keeps_the_reasons(tmp_path):
    out = epath.Path(tmp_path)
    maker, _ = _parts(out, 4, size=0)
    told = r"not one sample was made; .*says why:\n  a/x: no\n  train-00001-of-00003 s2: 0: clouds"
    with pytest.raises(ValueError, match=told):
        folder.finish(maker, out)
    assert sorted(path.name for path in out.iterdir()) == ["parts", "rejected.jsonl"]
