"""Statistics of a corpus that are right to the last digit, however it was cut: counts of every number that occurs.

Rows of the table whose numbers have 16 bits or fewer have at most 65 536 of them. Counts of parts add up to those of
the whole in any order; means, deviations and percentiles come from the counts. Next: build.py.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from skysense_jax.modalities import Modality


class Histograms:
    """Counts of the numbers of each band of each row, over valid pixels."""

    def __init__(self, rows: Sequence[Modality]):
        """``rows``: of which those with 32-bit numbers are left out."""
        self._rows = {row.name: row for row in rows if np.dtype(row.dtype).itemsize <= 2}
        self.counts: dict[str, Int64[np.ndarray, "C N"]] = {}

    def add(self, name: str, images: Shaped[np.ndarray, "*rest C"], valid: Bool[np.ndarray, "*rest"]) -> None:
        """Counts the valid pixels of images of the row called ``name``."""
        if name not in self._rows:
            return
        bits = np.ascontiguousarray(images[valid]).view(f"u{images.dtype.itemsize}")
        size = 2 ** (8 * images.dtype.itemsize)
        found = np.stack([np.bincount(band, minlength=size) for band in bits.T])
        self.counts[name] = self.counts.get(name, 0) + found

    def merge(self, counts: Mapping[str, np.ndarray]) -> None:
        """Adds the counts of another part."""
        for name, found in counts.items():
            self.counts[name] = self.counts.get(name, 0) + found

    def save(self, path: pathlib.Path) -> None:
        """Writes them as one .npz, the same bytes for the same counts."""
        with path.open("wb") as file:  # a path would be given another suffix
            np.savez_compressed(file, **{name: self.counts[name] for name in sorted(self.counts)})

    def summary(self) -> dict[str, dict[str, list[float] | int]]:
        """For each row: how many valid pixels, and of each band mean, deviation, 1st, 50th and 99th percentile."""
        return {name: self._summary(name) for name in sorted(self.counts)}

    def _summary(self, name: str) -> dict[str, list[float] | int]:
        counts, dtype = self.counts[name], np.dtype(self._rows[name].dtype)
        values = np.arange(counts.shape[1], dtype=f"u{dtype.itemsize}").view(dtype).astype(np.float64)
        order = np.argsort(values)
        order = order[np.isfinite(values[order])]
        values, counts = values[order], counts[:, order]
        num = counts.sum(1)
        mean = counts @ values / num
        std = [np.sqrt(row @ np.square(values - m) / row.sum()) for row, m in zip(counts, mean)]
        ranks = {
            p: np.array([np.searchsorted(np.cumsum(row), p / 100 * row.sum()) for row in counts]) for p in (1, 50, 99)
        }
        return dict(
            pixels=int(num[0]),
            mean=mean.tolist(),
            std=np.asarray(std).tolist(),
            **{f"percentile_{p}": values[np.minimum(rank, len(values) - 1)].tolist() for p, rank in ranks.items()},
        )


def load(path: pathlib.Path | io.BytesIO) -> dict[str, np.ndarray]:
    """The counts of a file that ``save`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
