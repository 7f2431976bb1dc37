"""The whole network: unified backbone, fusion, query decoder and the heads that objectives read.

Student and teacher are the same module with different parameters; drop path is on where its draws are given.
``encode`` turns the views of one shape into features; the heads are methods, a step projects what it needs.
Next: backbone.py, fusion.py, queries.py, heads.py; train_step.py uses all of it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from skysense_jax.batch import Batch, Views
from skysense_jax.modalities import Modality
from skysense_jax.models.backbone import Backbone, RouterStats, SeparateBackbones
from skysense_jax.models.fusion import Fusion
from skysense_jax.models.heads import DistilHead, ProjectionHead, TextHead
from skysense_jax.models.queries import QueryDecoder

_FUSED = "fused"  # beside the modalities in what draw_drops returns
GRANULARITIES = ("pixel", "object", "image")
# One head per granularity shared by the modalities, one set for the fused features, one for the queries [our choice].
HEADS = (*(f"{source}_{g}" for source in ("modality", "fused") for g in GRANULARITIES), "query")


@struct.dataclass
class Features:
    """What the network sees in the views of one shape.

    Attributes:
      modality: stage-4 features per modality and date, no norm.
      usable: per modality, where they stand for clear ground of a present date.
      fused: one feature a cell over all modalities and dates.
      fused_usable: where at least one modality and date was usable.
      router: statistics of the mixture of experts, None without one.
      stage3: per modality and date, if asked for: tokens behind stage 3, up to 2 x 2 a cell.
    """

    modality: Mapping[str, Any]  # {m: B V T P Q D}
    usable: Mapping[str, Any]  # {m: B V T P Q} bool
    fused: Any  # B V P Q D
    fused_usable: Any  # B V P Q bool
    router: RouterStats | None
    stage3: Mapping[str, Any] | None = None  # {m: B V T P Q D}


def usable_cells(views: Views, present: Mapping[str, Bool[Array, "B _T"]]) -> dict[str, Bool[Array, "B V _T P Q"]]:
    """Per modality, cells of present dates where at least half of the pixels are valid and clear.

    Such a cell always has a valid stage-1 token, so the backbone's own validity adds nothing.
    """
    return {name: x & present[name][:, None, :, None, None] for name, x in views.cell_usable.items()}


class SkySense(nn.Module):
    """SkySense V2 (arXiv 2507.13812 sec. 3), all parameters of one side (student or teacher)."""

    backbone: Backbone | SeparateBackbones
    fusion: Fusion
    queries: QueryDecoder
    text: TextHead
    head: ProjectionHead  # the form of every projection head
    distil: DistilHead | None = None  # for the time of a distillation; nothing else asks it

    def setup(self):
        self.heads = {name: self.head.clone() for name in HEADS}

    def encode(
        self,
        images: Mapping[str, Float[Array, "B V _T _H _W _C"]],
        views: Views,
        *,
        present: Mapping[str, Bool[Array, "B _T"]],
        day_of_year: Mapping[str, Int[Array, "B _T"]],
        train: bool,
        drop_draws: Mapping[str, Float[Array, "B _I _branches"]] | None = None,
        return_stage3: bool = False,
    ) -> Features:
        """Features of ``images`` (normalised); ``views`` gives the masks, its own images are not read.

        ``train`` routes mixtures with a capacity; ``drop_draws``, of ``draw_drops``, leaves residual branches out.
        """
        flat = lambda x: rearrange(x, "B V T ... -> B (V T) ...")  # noqa: E731
        date_valid = {name: views.token_valid[name] & present[name][:, None, :, None, None] for name in images}
        out = self.backbone(
            {name: flat(x) for name, x in images.items()},
            {name: flat(x) for name, x in date_valid.items()},
            train=train,
            drop_draws=drop_draws,
            return_stages=return_stage3,
        )
        num_views = views.affine.shape[1]
        split = lambda x: rearrange(x, "B (V T) ... -> B V T ...", V=num_views)  # noqa: E731
        features = {name: split(x) for name, x in out.features.items()}
        usable = {name: x for name, x in usable_cells(views, present).items() if name in images}
        fused, fused_usable = self.fusion(
            features,
            usable,
            {m: day_of_year[m] for m in images},
            train=train,
            drop_draws=None if drop_draws is None else drop_draws[_FUSED],
        )
        stage3 = {name: split(stages[2]) for name, stages in out.stages.items()} if return_stage3 else None
        return Features(features, usable, fused, fused_usable, out.router, stage3)

    def aggregate(self, features: Features) -> Float[Array, "B V R D"]:
        """The semantic queries' features of each view (sec. 3.3)."""
        return self._decode(features, False)[0]

    def query_attention(self, features: Features) -> Float[Array, "B V R P Q"]:
        """Where each query looks: cross-attention over the cells, mean over heads."""
        rows = features.fused.shape[2]
        return rearrange(self._decode(features, True)[1], "B V R (P Q) -> B V R P Q", P=rows)

    def _decode(self, features: Features, return_attention: bool):
        cells = rearrange(features.fused, "B V P Q D -> B V (P Q) D")
        usable = rearrange(features.fused_usable, "B V P Q -> B V (P Q)")
        return self.queries(cells, usable, return_attention=return_attention)

    def project(
        self, name: str, x: Float[Array, "*rows D"]
    ) -> tuple[Float[Array, "*rows _bottleneck"], Float[Array, "Z _bottleneck"]]:
        """Unit rows of head ``name``, one of ``HEADS``, and its unit prototypes; fp32."""
        return self.heads[name](x)

    def describe(self, fused: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows X"], Float[Array, ""]]:
        """Cell features in the text encoder's space, of unit length, and one over the learned temperature."""
        return self.text(fused)

    def distilled(self, level: str, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        """Features of a level at the width of the network that is distilled."""
        return self.distil(level, x)

    def __call__(self, batch: Batch, *, train: bool) -> Features:
        """Features of the local views, having touched every parameter: what ``init`` traces."""
        views = batch.local_views
        images = {name: jnp.asarray(x, jnp.float32) for name, x in views.images.items()}
        given = dict(present=batch.present, day_of_year=batch.day_of_year, train=train)
        features = self.encode(images, views, **given, return_stage3=self.distil is not None)
        for name in HEADS:
            x = (
                features.fused
                if name == "query" or name.startswith("fused")
                else next(iter(features.modality.values()))
            )
            self.project(name, x)
        self.aggregate(features)
        self.describe(features.fused)
        if self.distil is not None:
            first = next(iter(features.modality))
            of_level = {"stage3": features.stage3[first], "stage4": features.modality[first], "fused": features.fused}
            for level, _ in self.distil.widths:
                self.distilled(level, of_level[level])
        return features


def draw_drops(model: SkySense, views: Views, *, key: PRNGKeyArray) -> dict[str, Float[Array, "B _I _branches"]] | None:
    """Uniform numbers for every residual branch of every image of ``views``, and of the fusion's cells.

    None if the network has no drop path. A sample's numbers depend on its place in the batch, not on how it is cut.
    """
    if not model.backbone.drop_path and not model.fusion.drop_path:
        return None
    sizes = {name: (x.shape[1] * x.shape[2], 2 * sum(model.backbone.depths)) for name, x in views.images.items()}
    cells = next(iter(views.cell_usable.values()))
    sizes[_FUSED] = (cells.shape[1] * cells.shape[3] * cells.shape[4], 2 * model.fusion.depth)
    ends = np.cumsum([images * branches for images, branches in sizes.values()])
    draws = jnp.split(jax.random.uniform(key, (len(cells), int(ends[-1]))), ends[:-1], axis=1)
    return {name: x.reshape(len(cells), *size) for (name, size), x in zip(sizes.items(), draws)}


def build(
    modalities: tuple[Modality, ...],
    *,
    compute_dtype: str,
    backbone: Mapping[str, Any],
    fusion: Mapping[str, Any],
    queries: Mapping[str, Any],
    heads: Mapping[str, Any],
    text_dim: int,
    remat: str = "none",
    scan_unroll: int = 1,
    attention: str = "xla",
    window_attention: str = "xla",
    distil_widths: Mapping[str, int] | None = None,
) -> SkySense:
    """The network of a config's ``model`` and ``efficiency`` sections (``assembly.efficiency``).

    ``distil_widths``: by level, of a network that this one is to learn from; None: from none.
    """
    common = dict(compute_dtype=jnp.dtype(compute_dtype))
    scanned = dict(remat=remat, scan_unroll=scan_unroll, attention=attention, **common)
    return SkySense(
        backbone=make_backbone(modalities, **backbone, window_attention=window_attention, **scanned),
        fusion=Fusion(modalities=tuple(m.name for m in modalities), **fusion, **scanned),
        queries=QueryDecoder(width=fusion["width"], head_width=fusion["head_width"], **queries, **common),
        text=TextHead(text_dim=text_dim, **common),
        head=ProjectionHead(**heads, **common),
        distil=None if distil_widths is None else DistilHead(tuple(distil_widths.items()), **common),
    )


def make_backbone(
    modalities: tuple[Modality, ...], *, shared: bool = True, **fields: Any
) -> Backbone | SeparateBackbones:
    """The backbone with the fields of ``config.model.backbone``: one for all modalities, or one for each."""
    return Backbone(modalities=modalities, **fields) if shared else SeparateBackbones(modalities, tuple(fields.items()))
