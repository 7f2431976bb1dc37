"""What travels from the input pipeline into the step: plain arrays under these names, and nothing else.

Grain elements are nested dicts with the same keys (worker processes then need no jax); ``Batch.from_dict`` names them.
Masks: True means usable. No value ever stands for "missing". The fields are typed ``Any`` because a batch of shapes or
of shardings is a batch too; shapes stand beside them.
"""

from collections.abc import Mapping
from typing import Any

from flax import struct


@struct.dataclass
class Views:
    """All views of one shape (global or local) of a batch, aligned over modalities.

    Attributes:
      images: per modality, raw numbers in its table unit and dtype; invalid pixels hold the rounded band mean.
      token_valid: per modality on its stage-1 token grid: at least half of the patch's pixels are valid data.
        Decides what the backbone sees (clouds are seen).
      cell_usable: per modality on the cell grid: at least half of the cell's pixels are valid and cloud-free.
        Decides what losses and fusion use.
      labels: share of the cell's sub-pixels per label class; all zero where nothing is mapped. Sums to at most 1.
      affine: token offset from the view's centre, in the view's own axes and cells, to ground cells of the sample:
        ``ground = affine[:, :2] @ offset + affine[:, 2]``, (row, column).
    """

    images: Mapping[str, Any]  # {m: B V T H W C}
    token_valid: Mapping[str, Any]  # {m: B V T P Q} bool, P and Q of stage 1
    cell_usable: Mapping[str, Any]  # {m: B V T P Q} bool
    labels: Any  # B V P Q L, float
    affine: Any  # B V 2 3, float32


@struct.dataclass
class Batch:
    """One step's samples.

    Attributes:
      global_views, local_views: the two view shapes.
      present: per modality, whether the drawn date exists in the sample.
      day_of_year: per modality 1-366, 0 = undated (also for absent dates).
      record: index of the sample in the mixed, unshuffled dataset.
      bad_record: index of an unreadable record that ``record`` stands in for, -1 for none.
    """

    global_views: Views
    local_views: Views
    present: Mapping[str, Any]  # {m: B T} bool
    day_of_year: Mapping[str, Any]  # {m: B T} int32
    record: Any  # B, int32
    bad_record: Any  # B, int32

    @classmethod
    def from_dict(cls, element: Mapping[str, Any]) -> "Batch":
        """The batch that a nested dict of the same keys holds."""
        views = {name: Views(**element[name]) for name in ("global_views", "local_views")}
        return cls(**{**element, **views})
