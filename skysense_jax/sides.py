"""The student's and the teachers' networks as the losses call them, and the inputs that all are given.

Next: models/skysense.py (the network), train_step.py (who compares what with what).
"""

import dataclasses
from typing import Any

import jax
from einops import rearrange
from jaxtyping import Array, Float

from skysense_jax import photometric
from skysense_jax.batch import Batch
from skysense_jax.losses import distil, matching, mgcl
from skysense_jax.modalities import Modality
from skysense_jax.models.skysense import Features, SkySense, draw_drops
from skysense_jax.photometric import named_key

FUSED = "fused"  # the set of fused features, beside one set per modality


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch ready for the network: normalised images of both view shapes, and how views lie on each other.

    Arrays have the batch first, or are ``Shared``.
    """

    batch: Batch
    global_images: Any  # {m: B V T H W C}
    local_images: Any
    matches: tuple[matching.Match, matching.Match]  # of global and of local student views on the teacher's
    drops: tuple[Any, Any]  # of the student's global and local views, by ``draw_drops``


def prepare_inputs(
    batch: Batch,
    modalities: tuple[Modality, ...],
    model: SkySense,
    *,
    key: jax.Array,
    strength: float,
    num_positions: int,
) -> Inputs:
    """The batch with photometric changes drawn from ``key``, normalised, and its views matched on the ground."""
    images, matches, drops = [], [], []
    teacher_grid = batch.global_views.labels.shape[2:4]
    for name, views in (("global", batch.global_views), ("local", batch.local_views)):
        view_key = named_key(key, name)
        images.append(photometric.prepare(views, modalities, key=named_key(view_key, "photometric"), strength=strength))
        drops.append(draw_drops(model, views, key=named_key(view_key, "drop_path")))
        matches.append(
            matching.match_views(
                views.affine,
                batch.global_views.affine,
                student_grid=views.labels.shape[2:4],
                teacher_grid=teacher_grid,
                same=name == "global",
                key=named_key(view_key, "positions"),
                num_positions=num_positions,
            )
        )
    return Inputs(batch, *images, tuple(matches), tuple(drops))


def feature_sets(features: Features) -> dict[str, mgcl.Tokens]:
    """Tokens of each modality, and of the fused features as one date."""
    sets = {
        name: mgcl.Tokens(
            rearrange(x, "B V T P Q D -> B V T (P Q) D"), rearrange(features.usable[name], "B V T P Q -> B V T (P Q)")
        )
        for name, x in features.modality.items()
    }
    sets[FUSED] = mgcl.Tokens(
        rearrange(features.fused, "B V P Q D -> B V 1 (P Q) D"),
        rearrange(features.fused_usable, "B V P Q -> B V 1 (P Q)"),
    )
    return sets


def distilled_sets(features: Features) -> distil.Sets:
    """Tokens by level (losses/distil.py) and set; level "stage3" if ``features`` have it.

    A token behind stage 3 is usable where its cell is.
    """
    of_stage4 = feature_sets(features)
    levels = {"fused": {FUSED: of_stage4.pop(FUSED)}, "stage4": of_stage4}
    if features.stage3 is not None:
        levels["stage3"] = {}
        for name, x in features.stage3.items():
            per_cell = x.shape[3] // features.usable[name].shape[3]
            usable = features.usable[name].repeat(per_cell, axis=3).repeat(per_cell, axis=4)
            levels["stage3"][name] = mgcl.Tokens(
                rearrange(x, "B V T P Q D -> B V T (P Q) D"), rearrange(usable, "B V T P Q -> B V T (P Q)")
            )
    return levels


class Side:
    """The student's, the teacher's or a frozen network with its parameters, as the losses call it.

    ``train``: with the routing of training.
    """

    def __init__(self, model: SkySense, params: Any, *, drops: bool, train: bool = True):
        self._model, self._params, self._drops, self._train = model, params, drops, train

    def encode(self, inputs: Inputs, name: str, *, return_stage3: bool = False) -> Features:
        """Features of the global or local views."""
        images = inputs.global_images if name == "global" else inputs.local_images
        views = inputs.batch.global_views if name == "global" else inputs.batch.local_views
        drop_draws = inputs.drops[0 if name == "global" else 1] if self._drops else None
        return self._model.apply(
            {"params": self._params},
            images,
            views,
            present=inputs.batch.present,
            day_of_year=inputs.batch.day_of_year,
            train=self._train,
            drop_draws=drop_draws,
            return_stage3=return_stage3,
            method="encode",
        )

    def project(self, set_name: str) -> mgcl.Project:
        """The projection of a set of features, by granularity."""
        source = FUSED if set_name == FUSED else "modality"
        return lambda granularity, x: self._call("project", f"{source}_{granularity}", x)

    def queries(self, features: Features) -> Float[Array, "B V R D"]:
        """The semantic queries of each view."""
        return self._call("aggregate", features)

    def project_queries(self, x: Float[Array, "*rows D"]) -> tuple[Any, Any]:
        """The projection of standardised queries: unit rows, and unit prototypes."""
        return self._call("project", "query", x)

    def describe(self, fused: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows X"], Float[Array, ""]]:
        """Cell features in the text encoder's space, and the scale of their similarities."""
        return self._call("describe", fused)

    def distilled(self, level: str, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        """Features of a level of ``distilled_sets`` at the frozen network's width."""
        return self._call("distilled", level, x)

    def _call(self, method: str, *args):
        return self._model.apply({"params": self._params}, *args, method=method)
