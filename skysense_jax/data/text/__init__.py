"""The table of text embeddings that L_ITA reads: one unit vector per class of the label map.

The committed table was made by make_table.py. numpy only.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_FIELD = "config.objective.text_table"
_NORM_TOLERANCE = 1e-3


def load_text_table(
    path: str | os.PathLike, classes: Sequence[str], *, text_dim: int | None = None
) -> Float[np.ndarray, "L X"]:
    """The unit embedding of each of ``classes``, in their order, fp32.

    The file is an npz with arrays ``classes`` (names) and ``embeddings``; ``text_dim`` is the width that the network's
    text head has, if known.

    Raises:
      ValueError: no such file, other classes, rows that are not finite and of length 1, or another width.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{_FIELD}: {path} is no file; wanted an npz as data/text/make_table.py writes")
    with np.load(path, allow_pickle=False) as table:
        missing = {"classes", "embeddings"} - set(table.files)
        if missing:
            raise ValueError(f"{_FIELD}: {path} holds {sorted(table.files)}; wanted 'classes' and 'embeddings'")
        names, embeddings = tuple(map(str, table["classes"])), table["embeddings"].astype(np.float32)
    if names != tuple(classes):
        raise ValueError(
            f"{_FIELD}: {path} is for the classes {names}; wanted {tuple(classes)}, as config.data.label_classes says"
        )
    if embeddings.ndim != 2 or len(embeddings) != len(names):
        raise ValueError(f"{_FIELD}: {path} holds embeddings of shape {embeddings.shape}; wanted ({len(names)}, width)")
    if text_dim is not None and embeddings.shape[1] != text_dim:
        raise ValueError(
            f"{_FIELD}: {path} holds embeddings of width {embeddings.shape[1]}; wanted {text_dim}: "
            "set config.model.text_dim to the table's width"
        )
    lengths = np.linalg.norm(embeddings, axis=1)
    bad = ~(np.abs(lengths - 1) <= _NORM_TOLERANCE)  # NaN counts as bad
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"{_FIELD}: {path}: the embedding of {names[first]!r} has length {lengths[first]:.4g}; wanted unit rows"
        )
    return embeddings
