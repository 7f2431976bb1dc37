"""Files of a manifest, which plan.py writes and build.py reads: a build needs none of the libraries that find sources.

Next: plan.py, build.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from skysense_jax.modalities import MODALITIES, Modality, arguments, select

PLACES, ACQUISITIONS, LABELS, SOURCES = "places.parquet", "acquisitions.parquet", "labels.parquet", "sources.json"
REJECTED = "rejected.jsonl"


def rows_with(new: Sequence[Mapping[str, Any]]) -> tuple[Modality, ...]:
    """The rows of the table, then ``new`` ones, as TOML and JSON have them.

    Raises:
      TypeError, ValueError, AttributeError: they are no arguments of ``Modality``.
    """
    new = [arguments(row) for row in new]
    return select([*MODALITIES, *(row.get("name", "?") for row in new)], new)
