"""A fault put into a good sample is suspected, with its figure, and nothing else is; a good sample is not."""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from skysense_jax.data.records import encode_sample
from skysense_jax.data.sample import UNDATED
from skysense_jax.ingest import figures, index, suspicions
from skysense_jax.ingest.suspicions import KINDS, Suspicions
from tests.data.random_samples import ROWS, make_sample, with_series

SHARD = "train-00000-of-00001"
PLACE = "32632_704000_5504000"  # of 160 m; its centre:
LONGITUDE, LATITUDE = 11.82744, 49.65302


def _good(seed):
    sample = make_sample(seed, extent_cells=16, dates=dict(hr=1, s2=5, s1=3), name=f"good-{seed}")
    return dataclasses.replace(sample, longitude=LONGITUDE, latitude=LATITUDE)


def _suspicions(*samples, keep=9, always=()):
    found, rows, measured = Suspicions(keep=keep, always=always), [], []
    for number, sample in enumerate(samples):
        where = dict(shard=SHARD, record=number)
        rows.append(index.row(index.facts(sample, split="train", **where), ROWS))
        measured += figures.measure(sample, ROWS, **where)
    suspicions.of_index(pa.dataset.dataset(pa.Table.from_pylist(rows)), found)
    _of_figures(pa.Table.from_pylist(measured, figures.SCHEMA), found)
    return found


def _of_figures(table, found):
    dataset = pa.dataset.dataset(table)
    suspicions.of_figures(dataset, ROWS, suspicions.look(dataset, ROWS), found)


def _changed(name, change):
    """A fault: ``change`` of a copy of the images of a modality, in place."""

    def fault(sample):
        images = sample.series[name].images.copy()
        change(images)
        return with_series(sample, name, images=images)

    return fault


def _add(images, *, by, to=slice(None)):
    images[to] = np.clip(images[to].astype(np.int64) + by, 1, 20000)


def _dark(images):
    images[:] = np.maximum(images // 3, 1)  # as over forest, before an offset is subtracted once more
    images[..., :3] = np.maximum(images[..., :3].astype(int) - 350, 1)


def _fill(images, *, numbers, date=0, rows=slice(None), columns=slice(None)):
    images[date, rows, columns] = numbers


def _days(name, days):
    return lambda sample: with_series(sample, name, days=np.array(days, np.int32))


def _cover(sample):
    cloud = sample.series["s2"].cloud.copy()
    cloud[3, :14] = True
    return with_series(sample, "s2", cloud=cloud)


FAULTS = {
    "offset_left": (_changed("s2", lambda x: _add(x, by=1000)), "s2: its darkest pixels are at 1"),
    "offset_twice": (_changed("s2", _dark), "of a date are at the lowest number in red, green and blue"),
    "unit": (_changed("s1", lambda x: x.__setitem__(1, 10 ** (x[1] / 10))), "it looks like linear power"),
    "polarisations": (_changed("s1", lambda x: x.__setitem__(slice(None), x[..., ::-1].copy())), "VH exceeds VV by 7"),
    "too_early": (_days("s1", [15_000, 18_000, 18_100]), "s1: a date is of 2011-01-26"),
    "disorder": (_days("s2", [18_000, 18_100, 18_050, UNDATED, 18_020]), "s2: dates that lie before the one ahead: 2"),
    "repeated": (_changed("s2", lambda x: x.__setitem__(4, x[1])), "s2: dates with the pixels of another date: 1"),
    "single_valued": (
        _changed("s2", lambda x: _fill(x[..., 6], numbers=2500, date=2)),
        "s2: bands that are one number on a date: 1",
    ),
    "filled": (_changed("hr", lambda x: _fill(x, numbers=0, rows=slice(-40, None))), "hr: 8% of a date's valid pixels"),
    "full_scale": (
        _changed("s2", lambda x: _fill(x[..., 8], numbers=20000, rows=slice(8, None))),
        "s2: 53% of a date's valid pixels are at a band's upper limit",
    ),
    "far": (_changed("s2", lambda x: x[..., 2].__setitem__(slice(None), x[..., 2] + 6000)), "s2 B4: mean 7"),
    "unseen": (_cover, "of a date are cloud or no data"),
    "empty_map": (lambda sample: dataclasses.replace(sample, labels=sample.labels * 0), "nothing on it"),
    "elsewhere": (lambda sample: dataclasses.replace(sample, id="32632_604000_5504000"), "lies 100.1 km from"),
}
ALSO = {"too_early": {"far_day": 1}}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_in_a_good_sample_is_suspected_and_nothing_else(kind):
    fault, told = FAULTS[kind]
    good = [_good(seed) for seed in range(3)]
    bad = fault(_good(3))
    if kind == "single_valued":  # with masks, or corners that are not valid differ
        bad = with_series(bad, "s2", valid=np.ones_like(bad.series["s2"].valid))
    found = _suspicions(*good, bad)
    assert found.counts == {kind: 1} | ALSO.get(kind, {})
    assert encode_sample(bad, ROWS)  # checks of records let it pass
    (where,) = found.worst(num=5)
    assert where == (SHARD, 3)
    hit = found.told_of(where)[0]
    assert hit.kind == kind
    assert told in hit.told


def test_good_samples_are_not_suspected():
    found = _suspicions(*[_good(seed) for seed in range(4)])
    assert found.counts == {}
    assert found.worst(num=5) == []


def test_place_whose_position_is_that_of_its_name_is_not_suspected():
    for cells in (1, 16, 256):  # its centre moves with its size
        east, south = LONGITUDE + (cells - 16) * 5 / 72_100, LATITUDE - (cells - 16) * 5 / 111_200
        sample = dataclasses.replace(_good(0), id=PLACE, longitude=east, latitude=south)
        assert _suspicions(sample).counts == {}


def test_namesakes_and_twins_are_found_with_their_number():
    samples = [
        _good(0),
        _good(1),
        dataclasses.replace(_good(0), id="again"),
        dataclasses.replace(_good(2), id="good-1"),
    ]
    found = _suspicions(*samples)
    assert found.counts == {"namesakes": 2, "twins": 2 * 3}  # twins in each of three rows
    assert {hit.told for hit in found.told_of((SHARD, 2))} == {
        f"{name}: other samples with the same pixels: 1" for name in ("hr", "s2", "s1")
    }
    assert [hit.told for hit in found.told_of((SHARD, 1))] == ["samples with its name: 2"]


def test_day_far_from_all_others_is_found_with_the_day():
    days = lambda first: _days("s1", [first, first + 17, first + 34])  # noqa: E731
    samples = [days(18_000 + 30 * seed)(_good(seed)) for seed in range(6)]
    assert _suspicions(*samples).counts == {}
    found = _suspicions(*samples[:5], days(20_000)(_good(5)))
    assert found.counts == {"far_day": 1}
    assert found.told_of((SHARD, 5))[0].told == "s1: a date is of 2024-11-07"


def test_worst_samples_take_turns_by_kind_the_gravest_first():
    offset = [_changed("s2", lambda x, by=by: _add(x, by=by))(_good(by)) for by in (1500, 1100, 1900)]
    covered = _cover(_good(7))
    found = _suspicions(*offset, covered)
    assert found.counts == {"offset_left": 3, "unseen": 1}
    assert [record for _, record in found.worst(num=9)] == [2, 3, 0, 1]
    assert [record for _, record in found.worst(num=2)] == [2, 3]
    assert [record for _, record in _suspicions(*offset, covered, keep=1).worst(num=9)] == [2, 3]


def test_what_is_odd_of_samples_that_are_shown_anyway_is_remembered():
    offset = [_changed("s2", lambda x, by=by: _add(x, by=by))(_good(by)) for by in (1500, 1100, 1900)]
    both = _cover(offset[1])
    found = _suspicions(offset[0], both, offset[2], _good(0), keep=1, always=[(SHARD, 1), (SHARD, 3), ("other", 2)])
    assert found.worst(num=9) == [(SHARD, 2), (SHARD, 1)]
    assert [hit.kind for hit in found.told_of((SHARD, 1))] == ["offset_left", "unseen"]
    assert [[hit.kind for hit in found.told_of((SHARD, record))] for record in (0, 2, 3)] == [[], ["offset_left"], []]


def test_figures_that_come_in_many_batches_are_all_looked_at():
    rows = [entry for seed in range(6) for entry in figures.measure(_good(seed), ROWS, shard="a", record=seed)]
    tables = [pa.Table.from_pylist([row], figures.SCHEMA) for row in rows]
    tables[7] = tables[7].set_column(10, "filled", pa.array([0.5], pa.float32()))  # s2 of record 2
    found = Suspicions(keep=3)
    _of_figures(pa.concat_tables([*tables, tables[4].slice(0, 0)]), found)
    assert found.counts == {"filled": 1}
    assert found.worst(num=1) == [("a", 2)]


def test_samples_without_a_map_days_or_position_are_no_trouble():
    undated = _days("hr", [UNDATED])(_good(0))
    alone = dict(series={"hr": undated.series["hr"]}, labels=None)
    assert _suspicions(dataclasses.replace(undated, longitude=None, latitude=None, id=PLACE, **alone)).counts == {}


def test_every_kind_has_a_test_here_and_a_line_in_the_docs():
    told_elsewhere = {"unreadable", "namesakes", "twins", "far_day"}
    assert {*FAULTS, *told_elsewhere} == {kind.name for kind in KINDS}
    text = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [kind.title for kind in KINDS if f"| {kind.title} |" not in text] == []
