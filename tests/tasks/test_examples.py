"""Shares of examples, and what is refused of their targets."""

import dataclasses

import numpy as np
import pytest

from skysense_jax.tasks.examples import (
    Deferred,
    Example,
    Examples,
    Lazy,
    check,
    image_of,
    part_name,
    split_shares,
    take_share,
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Stands in for a sample whose pixels nobody reads."""

    id: str
    extent_cells: int

    def days(self, modality):
        raise AssertionError("read")

    window = labels_window = days


def _scenes(counts):
    targets = np.repeat(np.arange(len(counts)), counts)
    made = [Example(f"{i}", Place(f"{i}", 2), None, np.array(int(t))) for i, t in enumerate(targets)]
    return Examples(made, tuple("abcdefg"[: len(counts)]), "scene")


def _maps(targets, *, classes=("a", "b"), cells=2, kind="segmentation", names=None):
    names = names or [str(i) for i in range(len(targets))]
    make = lambda i: Example(names[i], Place("x", cells), None, targets[i])  # noqa: E731
    return Examples(Lazy(len(targets), make, lambda i: names[i].partition("#")[0]), classes, kind)


def test_share_of_scenes_is_that_of_each_class_and_at_least_one():
    examples = _scenes((10, 37, 3))
    for share, wanted in ((0.1, (1, 4, 1)), (0.5, (5, 18, 2)), (0.01, (1, 1, 1)), (1.0, (10, 37, 3))):
        kept = take_share(examples, share, seed=3)
        assert tuple(np.bincount([int(e.target) for e in kept])) == wanted
        again = take_share(examples, share, seed=3)
        assert [e.id for e in kept] == [e.id for e in again]
    small, large = ({e.id for e in take_share(examples, share, seed=3)} for share in (0.1, 0.5))
    assert small < large
    assert small != {e.id for e in take_share(examples, 0.1, seed=4)}


def test_share_of_maps_is_that_of_images_with_all_their_parts():
    names = [part_name(f"image{i}", r, 0) for i in range(5) for r in range(i + 1)]
    examples = _maps([np.zeros((4, 4), np.uint8)] * len(names), names=names)
    kept, rest = split_shares(examples, 0.4, seed=0)
    images = [{e.image for e in part} for part in (kept, rest)]
    assert len(images[0]) == 2
    assert len(images[1]) == 3
    assert sorted(e.id for part in (kept, rest) for e in part) == sorted(names)
    with pytest.raises(ValueError, match=r"share 1\.5; wanted above 0, at most 1"):
        take_share(examples, 1.5, seed=0)


def test_name_of_an_image_may_have_the_sign_of_a_part():
    assert image_of(part_name("tile#1", 0, 16)) == "tile#1"
    assert [image_of(name) for name in ("tile#1", "a#3,4#0,16", "a/b.c")] == ["tile#1", "a#3,4", "a/b.c"]


def test_images_are_known_without_making_an_example():
    names = [part_name(name, 0, i) for i, name in enumerate("abcab")]
    examples = _maps([np.zeros((4, 4), np.uint8)] * 5, names=names)
    kept, _ = split_shares(examples, 0.67, seed=0)
    wanted = [[e.id for e in kept if e.image == name] for name in sorted({e.image for e in kept})]
    assert len(wanted) == 2
    unread = Examples(Lazy(5, pytest.fail, examples.examples.image), ("a", "b"), "segmentation")
    assert unread.images == ((0, 3), (1, 4), (2,))
    assert kept.image_names == tuple(e.image for e in kept)
    assert [[kept[i].id for i in places] for places in kept.images] == wanted


@pytest.mark.parametrize(
    ("examples", "match"),
    [
        (_maps([]), "no example in train"),
        (_maps([np.full((4, 4), 255, np.uint8)]), "train has no label"),
        (_maps([np.full((4, 4), 2, np.uint8)]), "class id 2; wanted 0 to 1 .a, b., or 255"),
        (_maps([np.zeros((4, 6), np.uint8)]), r"a map of \(4, 6\) for 2 cells"),
        (_maps([np.zeros((5, 5), np.uint8)]), r"a map of \(5, 5\) for 2 cells"),
        (_maps([np.zeros((4, 4))]), "target float64 of shape"),
        (_maps([np.zeros((4, 4), np.uint8)], classes=("a",)), "wanted two or more"),
        (dataclasses.replace(_scenes((2, 2)), classes=("a", "b", "c"), kind="multi_label"), "wanted one of kind"),
        (dataclasses.replace(_scenes((2, 2, 2)), classes=("a", "b")), "class id 2; wanted 0 to 1"),
    ],
)
def test_targets_that_are_not_of_their_kind_are_refused(examples, match):
    with pytest.raises(ValueError, match=match):
        check(examples, split="train")


def test_targets_that_are_of_their_kind_pass_without_a_pixel_read():
    check(_scenes((2, 1)), split="train")
    check(_maps([np.array([[0, 255], [1, 1]], np.uint8), np.full((8, 8), 255, np.uint8)]), split="train")
    check(_maps([np.ones((1, 1), np.uint8)], cells=3), split="train")
    some = Examples([Example("x", Place("x", 1), None, np.array([True, False]))], ("a", "b"), "multi_label")
    check(some, split="train")


def test_deferred_samples_are_opened_when_read_and_a_few_are_kept():
    opened = []
    several = [Deferred(str(i), lambda i=i: opened.append(i) or Place(str(i), i + 2)) for i in range(6)]
    assert opened == []
    assert [d.extent_cells for d in several] == [2, 3, 4, 5, 6, 7]
    assert several[0].extent_cells == 2
    assert opened == list(range(6))
    with pytest.raises(AssertionError, match="read"):
        several[5].days("s2")
    assert opened == list(range(6))
