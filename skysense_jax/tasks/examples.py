"""What a labelled dataset is to every task: examples of one kind, with their classes; and shares of them.

An example says where its pixels can be read, and holds its target. Next: folders.py and recordsets.py, which make
them; frozen.py, which uses them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from skysense_jax.data.sample import SampleReader, Window
from skysense_jax.eval.scores import IGNORED

SCENE, MULTI_LABEL, SEGMENTATION, CHANGE = KINDS = ("scene", "multi_label", "segmentation", "change")
MAPS = (SEGMENTATION, CHANGE)  # kinds whose target is a map
_PART = "#"  # between the name of an image and the place of a part of it
_PARTS = re.compile(rf"{_PART}\d+,\d+$")
IMAGES_AT_ONCE = 8  # of which parts are read in turns; their files are kept meanwhile (images.py), each may be 100 MB


@dataclasses.dataclass(frozen=True)
class Example:
    """A place and what is to be known of it.

    Attributes:
      id: unique in its dataset; of a part of a larger image "IMAGE#ROW,COLUMN".
      before: its pixels.
      after: of the second date of change detection; else None.
      target: [] int, a scene class; [K] bool, multi-label; or [H W] uint8, a map of class ids, IGNORED where there is
        none. The side of a map is a whole multiple or divisor of the sample's extent in cells.
    """

    id: str
    before: SampleReader
    after: SampleReader | None
    target: np.ndarray

    @property
    def image(self) -> str:
        """The name of the image that it is, or is a part of."""
        return image_of(self.id)


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """Examples of one split.

    Attributes:
      examples: in a fixed order; may make one when it is asked for (``Lazy``).
      classes: names by id.
      kind: one of ``KINDS``.
      num_dates: of a modality, the most dates that an example has; of one that is not here it is not known.
    """

    examples: Sequence  # of Example; what makes them when asked for must not be asked by a type checker
    classes: tuple[str, ...]
    kind: str
    num_dates: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return (self.examples[i] for i in range(len(self.examples)))

    @functools.cached_property
    def image_names(self) -> tuple[str, ...]:
        """Of each example the name of the image that it is, or is a part of; ``Lazy`` ones are not made for it."""
        name = self.examples.image if isinstance(self.examples, Lazy) else lambda i: self.examples[i].image
        return tuple(name(i) for i in range(len(self)))

    @functools.cached_property
    def images(self) -> tuple[tuple[int, ...], ...]:
        """Of each image the places of its parts, in order."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.image_names):
            found.setdefault(name, []).append(i)
        return tuple(map(tuple, found.values()))

    def pick(self, places: Sequence[int]) -> "Examples":
        """Those at the places."""
        names = self.image_names
        return dataclasses.replace(
            self, examples=Lazy(len(places), lambda i: self[places[i]], lambda i: names[places[i]])
        )


@dataclasses.dataclass(frozen=True)
class Lazy(Sequence):
    """A sequence of ``length`` examples of which ``make(index)`` gives one, every time that it is asked for.

    ``image(index)`` names the image that it is a part of, without making it.
    """

    length: int
    make: Callable[[int], Example]
    image: Callable[[int], str]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.make(index)


@dataclasses.dataclass(eq=False)
class Deferred:
    """A sample that ``open`` reads when its pixels are asked for; a few of all that were read last are kept."""

    id: str
    open: Callable[[], SampleReader]

    @functools.cached_property
    def extent_cells(self) -> int:
        return _opened(self).extent_cells

    def days(self, modality: str) -> np.ndarray:
        return _opened(self).days(modality)

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        return _opened(self).window(modality, date, row, column, side)

    def labels_window(self, row: int, column: int, side: int) -> np.ndarray | None:
        return _opened(self).labels_window(row, column, side)


@functools.lru_cache(maxsize=IMAGES_AT_ONCE)
def _opened(deferred: Deferred) -> SampleReader:
    return deferred.open()


@dataclasses.dataclass(frozen=True)
class Part:
    """The square of ``extent_cells`` cells of a larger sample whose north-west corner is cell (row, column)."""

    id: str
    whole: SampleReader
    row: int
    column: int
    extent_cells: int

    def days(self, modality: str) -> np.ndarray:
        return self.whole.days(modality)

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        return self.whole.window(modality, date, self.row + row, self.column + column, side)

    def labels_window(self, row: int, column: int, side: int) -> np.ndarray | None:
        return self.whole.labels_window(self.row + row, self.column + column, side)


def part_name(image: str, row: int, column: int) -> str:
    """The id of a part of an image."""
    return f"{image}{_PART}{row},{column}"


def image_of(name: str) -> str:
    """The image of which an example called so is, or is a part."""
    return _PARTS.sub("", name)


def check(examples: Examples, *, split: str) -> None:
    """Nothing, if every target is what its kind promises; reads all of them and no pixel.

    Raises:
      ValueError: no example, a target of another form, a class id that no class has, or a map without one label.
    """
    kind, count = examples.kind, len(examples.classes)
    if not len(examples):
        raise ValueError(f"--dataset: no example in {split}")
    if count < 2 and kind != MULTI_LABEL:
        raise ValueError(f"--dataset: classes {examples.classes}; wanted two or more")
    labelled = 0
    for example in examples:
        target, where = np.asarray(example.target), f"--dataset: {split} example {example.id!r}"
        wanted_shape = {SCENE: target.shape == (), MULTI_LABEL: target.shape == (count,)}.get(kind, target.ndim == 2)
        wanted_type = {SCENE: "iu", MULTI_LABEL: "b"}.get(kind, "u")
        if not wanted_shape or target.dtype.kind not in wanted_type:
            raise ValueError(f"{where}: target {target.dtype} of shape {target.shape}; wanted one of kind {kind!r}")
        if kind == MULTI_LABEL:
            labelled += int(target.sum())
            continue
        known = target[target != IGNORED] if kind in MAPS else target
        labelled += known.size
        if known.size and not 0 <= known.min() <= known.max() < count:
            raise ValueError(
                f"{where}: class id {int(known.max() if known.max() >= count else known.min())}; wanted 0 to "
                f"{count - 1} ({', '.join(examples.classes[:6])}{', ...' if count > 6 else ''})"
                + (f", or {IGNORED} for none" if kind in MAPS else "")
            )
        if kind in MAPS:
            cells, side = example.before.extent_cells, target.shape[0]
            if target.shape[1] != side or (side % cells and cells % side):
                raise ValueError(
                    f"{where}: a map of {target.shape} for {cells} cells; wanted a square whose side is a whole "
                    "multiple or divisor"
                )
    if not labelled:
        raise ValueError(f"--dataset: {split} has no label")


def take_share(examples: Examples, share: float, *, seed: int) -> Examples:
    """That share of the examples: of each class for scenes, of all images for other kinds; rounded, at least one.

    The same seed gives the same ones, and a larger share holds all of a smaller one. Parts of an image stay together.

    Raises:
      ValueError: the share is not above 0 and at most 1.
    """
    kept, _ = split_shares(examples, share, seed=seed)
    return kept


def split_shares(examples: Examples, share: float, *, seed: int) -> tuple[Examples, Examples]:
    """``take_share``, and the rest."""
    if not 0 < share <= 1:
        raise ValueError(f"share {share:g}; wanted above 0, at most 1")
    if examples.kind == SCENE:
        groups: dict[object, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(int(example.target), []).append(i)
        units = [[[i] for i in members] for _, members in sorted(groups.items())]
    else:
        units = [list(examples.images)]
    chosen: set[int] = set()
    for number, members in enumerate(units):
        order = np.random.default_rng((seed, number)).permutation(len(members))
        for place in order[: max(1, round(share * len(members)))]:
            chosen.update(members[place])
    everything = range(len(examples))
    return tuple(examples.pick([i for i in everything if (i in chosen) == kept]) for kept in (True, False))
