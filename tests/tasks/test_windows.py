"""Windows: pixels, masks and labels stay together when they are cut, mirrored and turned; order and draws by seed."""

import numpy as np
import pytest

from skysense_jax.data.sample import Sample, Series
from skysense_jax.modalities import select
from skysense_jax.tasks import windows
from skysense_jax.tasks.examples import CHANGE, IGNORED, IMAGES_AT_ONCE, SCENE, SEGMENTATION, Example, Examples, Lazy

HR, S2 = select(("hr", "s2"))
NUM_DATES = dict(hr=1, s2=2)


def example_of(extent, seed=0, *, per_cell=4, dates=2, kind=SEGMENTATION):
    """Labels that can be read off both sensors: 16 to a cell in hr, the first of a cell in the second date of s2."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 7, (extent * per_cell,) * 2).astype(np.uint8)

    def sample(name):
        pixels = target.repeat(HR.pixels_per_cell // per_cell, 0).repeat(HR.pixels_per_cell // per_cell, 1)
        hr = np.stack([pixels] * 3, -1)[None]
        s2 = rng.integers(0, 9, (dates, extent, extent, 10)).astype(np.uint16)
        s2[-1, ..., 0] = target[::per_cell, ::per_cell]
        clear = lambda x: np.zeros(x.shape[:3], bool)  # noqa: E731
        days = lambda x: np.arange(len(x), dtype=np.int32)  # noqa: E731
        series = {
            name: Series(x, ~clear(x), clear(x), days(x), np.zeros(len(x), np.uint8), 1.0)
            for name, x in (("hr", hr), ("s2", s2))
        }
        return Sample(name, extent, series)

    after = sample("after") if kind == CHANGE else None
    return Example(f"e{seed}", sample("before"), after, np.array(seed) if kind == SCENE else target)


def read(example, place, cells, kind=SEGMENTATION, per_cell=4):
    how = dict(num_dates=NUM_DATES, kind=kind, cells=cells, per_cell=per_cell)
    return windows.read_window(example, (HR, S2), place=place, **how)


def assert_aligned(element, cells):
    known = element["target"] != IGNORED
    hr = element["images"]["hr"][0, 0, ..., 0].reshape(cells * 4, 8, cells * 4, 8)
    np.testing.assert_array_equal(hr.min((1, 3))[known], element["target"][known])
    np.testing.assert_array_equal(hr.max((1, 3))[known], element["target"][known])
    for modality in (HR, S2):
        tokens = element["token_valid"][modality.name][0, 0]
        grid = np.kron(tokens, np.ones((cells * 4 // min(len(tokens), cells * 4),) * 2))
        if len(grid) > cells * 4:
            grid = grid.reshape(cells * 4, len(grid) // (cells * 4), cells * 4, -1).min((1, 3))
        np.testing.assert_array_equal(grid.astype(bool), known)
    return known


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_label_turns_with_its_pixels_and_masks(mirrored, quarters):
    element = read(example_of(3), (0, 0), 4)  # one row and one column of cells lie outside
    assert assert_aligned(element, 4).sum() == 12 * 12
    turned = windows.turned(element, mirrored=mirrored, quarters=quarters)
    assert_aligned(turned, 4)
    wanted = np.flip(element["target"], 1) if mirrored else element["target"]
    for _ in range(quarters):
        wanted = wanted[:, ::-1].T  # anticlockwise
    np.testing.assert_array_equal(turned["target"], wanted)
    first_band = element["images"]["s2"][0, 1, ..., 0], turned["images"]["s2"][0, 1, ..., 0]
    assert sorted(first_band[0].ravel()) == sorted(first_band[1].ravel())


def test_window_is_where_it_was_asked_for():
    example = example_of(5)
    element = read(example, (1, 2), 3)
    np.testing.assert_array_equal(element["target"], example.target[4:16, 8:20])
    assert assert_aligned(element, 3).all()
    assert element["images"]["s2"].shape == (1, 2, 3, 3, 10)
    assert element["present"]["s2"].shape == (1, 2)


def test_both_dates_of_a_change_are_read():
    element = read(example_of(3, kind=CHANGE), (0, 1), 2, kind=CHANGE)
    assert element["images"]["hr"].shape == (2, 1, 64, 64, 3)
    assert (element["images"]["s2"][0] != element["images"]["s2"][1]).any()
    np.testing.assert_array_equal(element["images"]["hr"][0], element["images"]["hr"][1])


def test_a_map_coarser_than_cells_is_repeated_and_another_density_refused():
    fine = example_of(4, per_cell=1)
    coarse = Example("coarse", fine.before, None, np.array([[1, 2], [3, IGNORED]], np.uint8))
    assert windows.label_pixels(coarse) == windows.label_pixels(fine) == 1
    np.testing.assert_array_equal(windows.label_map(coarse, per_cell=1)[1:3, 1:3], coarse.target)
    with pytest.raises(ValueError, match="example 'e0' has 1 label pixels a cell where others have 4"):
        windows.label_map(fine, per_cell=4)


def test_batches_see_every_example_once_an_epoch_and_depend_on_the_seed_alone():
    examples = Examples([example_of(3, seed, kind=SCENE) for seed in range(5)], tuple("abcde"), SCENE)
    how = dict(num_dates=NUM_DATES, cells=2, per_cell=1, batch_size=2)
    run = lambda seed, steps=5: list(  # noqa: E731
        windows.training_batches(examples, (HR, S2), num_steps=steps, seed=seed, **how)
    )
    first, again, other = run(1), run(1), run(2)
    order = np.concatenate([batch["target"] for batch in first])
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert order[:5].tolist() != order[5:].tolist()
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a["images"]["s2"], b["images"]["s2"])
    assert any((a["images"]["s2"] != b["images"]["s2"]).any() for a, b in zip(first, other))
    (longer,) = windows.training_batches(examples, (HR, S2), num_steps=1, seed=1, **{**how, "batch_size": 4})
    np.testing.assert_array_equal(longer["images"]["s2"][2:], first[1]["images"]["s2"])


def test_parts_of_a_few_images_at_a_time_are_mixed_and_whole_images_come_in_any_order():
    of_image = np.repeat(np.arange(10), [5, 3, 9, 1, 4, 4, 6, 2, 5, 7])
    examples = Examples(Lazy(len(of_image), pytest.fail, lambda i: str(of_image[i])), ("a", "b"), SEGMENTATION)
    orders = [windows.epoch_order(examples, np.random.default_rng(seed)) for seed in range(8)]
    groups = []
    for order in orders:
        assert sorted(order) == list(range(len(of_image)))
        seen = [int(image) for image in of_image[order]]
        first, last = (
            {image: at(image) for image in set(seen)} for at in (seen.index, lambda i: 45 - seen[::-1].index(i))
        )
        begun = sorted(first, key=first.get)
        # never more open than may be, and not one after the other
        open_at = [sum(first[i] <= place <= last[i] for i in begun) for place in range(len(seen))]
        assert 2 < max(open_at) <= IMAGES_AT_ONCE
        groups.append(frozenset(begun[:IMAGES_AT_ONCE]))
    assert len(set(groups)) > 4
    whole = Examples(Lazy(50, pytest.fail, str), ("a", "b"), SEGMENTATION)
    places = np.array([np.argsort(windows.epoch_order(whole, np.random.default_rng(seed))) for seed in range(200)])
    assert abs(np.corrcoef(places.T)[np.triu_indices(50, 1)]).max() < 0.35  # neighbours are not kept together
