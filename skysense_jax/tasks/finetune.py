"""Fine-tuning: the pre-trained network and a decoder trained together on labelled examples, and scored.

One entry, ``finetune``. It runs on the mesh that is set: windows are divided over its batch axes, parameters and
moments are whole on every device, so that a network must fit one. One process.
Next: decoders.py, layer_rates.py, windows.py, forward.py, sliding.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import struct
from jaxtyping import Float

from skysense_jax import optim
from skysense_jax.eval import scores
from skysense_jax.eval.ahead import ahead
from skysense_jax.eval.features import num_batch_shards, placed, replicated
from skysense_jax.tasks import forward, frozen, sliding, windows
from skysense_jax.tasks.decoders import CellDecoder, LinearHead, UPerNet
from skysense_jax.tasks.examples import CHANGE, KINDS, MAPS, MULTI_LABEL, SCENE, Example, Examples, check
from skysense_jax.tasks.forward import Tuned
from skysense_jax.tasks.layer_rates import HEAD, make_optimizer
from skysense_jax.tasks.loading import Model, check_form

FEATURES = ("auto", "stages", "fused")
_LOOK_EVERY = 50  # steps between two looks at the loss, for which the host waits


@dataclasses.dataclass(frozen=True)
class Options:
    """How to fine-tune. The defaults are our choice and were not tuned on a published dataset.

    Attributes:
      features: what the head reads: "stages", the maps of one modality's four stages, mean over dates; "fused", one
        feature a cell over all modalities and dates; "auto": stages of a single modality, else fused features.
      modality: whose stages; "": the model's only one.
      freeze: train the head alone; the network's parameters stay as they are, to the bit.
      cells: side of a window; 0: that of the run's views for maps; for scenes the largest sample's extent,
        at most twice that of the views.
      num_steps, batch_size: updates, and windows in each.
      learning_rate, final_learning_rate, warmup_steps: of the head, linear up and half a cosine down.
      layer_decay: what each layer's rate is multiplied by on the way from the head down (layer_rates.py).
      weight_decay, clip_norm: of AdamW; decay goes by name (optim.py).
      drop_path: of the last block, linear from 0 at the first one; of the network alone.
      decoder_width: width of the decoders of maps.
      overlap, weighting: of windows over images larger than one (sliding.py).
      left_out: classes that do not enter the mean scores of segmentation.
      seed: of the head, the order, the windows and drop path.
    """

    features: str = "auto"
    modality: str = ""
    freeze: bool = False
    cells: int = 0
    num_steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup_steps: int = 100
    layer_decay: float = 0.9
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    drop_path: float = 0.1
    decoder_width: int = 512
    overlap: float = 0.5
    weighting: str = "hann"
    left_out: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, wanted, right in (
            ("features", f"one of {FEATURES}", self.features in FEATURES),
            ("cells", "0 or more", self.cells >= 0),
            ("num_steps", "1 or more", self.num_steps >= 1),
            ("batch_size", "2 or more: batch norms need them", self.batch_size >= 2),
            ("learning_rate", "above 0", self.learning_rate > 0),
            ("final_learning_rate", "0 to learning_rate", 0 <= self.final_learning_rate <= self.learning_rate),
            ("warmup_steps", f"0 to num_steps ({self.num_steps})", 0 <= self.warmup_steps <= self.num_steps),
            ("layer_decay", "above 0, at most 1", 0 < self.layer_decay <= 1),
            ("drop_path", "0 to below 1", 0 <= self.drop_path < 1),
            ("decoder_width", "1 or more", self.decoder_width >= 1),
            ("overlap", "0 to below 1", 0 <= self.overlap < 1),
            ("weighting", f"one of {sliding.WEIGHTINGS}", self.weighting in sliding.WEIGHTINGS),
        ):
            if not right:
                raise ValueError(f"options.{name}: got {getattr(self, name)!r}; wanted {wanted}")


@struct.dataclass
class State:
    """Between two updates: trained and untouched parameters, the head's running statistics, moments."""

    params: Any  # {"head"} and, unless frozen, the network's parts
    frozen: Any
    statistics: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Result:
    """A fine-tuned network.

    Attributes:
      tuned: what it computes.
      params, statistics: with what; as ``forward.logits`` takes them.
      window: arguments of windows.read_window.
      options: with which it was trained.
      losses: of each update.
    """

    tuned: Tuned
    params: Any
    statistics: Any
    window: dict[str, Any]
    options: Options
    losses: np.ndarray


def _check(model: Model, train: Examples, test: Examples, task: str, options: Options) -> None:
    if task not in KINDS or {train.kind, test.kind} != {task}:
        kinds = f"{train.kind!r} to train on, {test.kind!r} to test"
        raise ValueError(f"task: got {task!r} with examples {kinds}; wanted one of {KINDS}, all alike")
    if train.classes != test.classes:
        raise ValueError(f"--dataset: got classes {train.classes} to train on, {test.classes} to test; wanted the same")
    names = [row.name for row in model.rows]
    if options.modality and (options.modality not in names or options.features == "fused"):
        raise ValueError(
            f"options.modality: got {options.modality!r} with features {options.features!r}; wanted one of {names}, "
            "and none with fused features"
        )
    if options.features == "stages" and len(names) > 1 and not options.modality:
        raise ValueError(f"options.modality: got none for stages; wanted one of {names}")
    if options.batch_size % num_batch_shards():
        raise ValueError(
            f"options.batch_size: got {options.batch_size}; wanted a multiple of the {num_batch_shards()} devices that "
            "share a batch"
        )
    check_form(model, shared=True, moe_from="end", why="fine-tuning has no rates by layer for another form")
    for split, examples in (("train", train), ("test", test)):
        check(examples, split=split)
    frozen.check_classes(train, by_pixel=True)


def _largest(examples: Examples, *, most: int) -> int:
    """Cells along the largest example, at most ``most``; when one has as many, the rest is not opened."""
    found = 0
    for example in examples:
        found = max(found, example.before.extent_cells)
        if found >= most:
            return most
    return found


def _prepare(model: Model, train: Examples, options: Options) -> tuple[Tuned, dict[str, Any]]:
    """What is computed, on which windows."""
    one = bool(options.modality) or len(model.rows) == 1
    fused = options.features == "fused" or (options.features == "auto" and not one)
    rows = tuple(row for row in model.rows if fused or row.name == (options.modality or model.rows[0].name))
    network = model.network.clone(
        backbone=model.network.backbone.clone(drop_path=options.drop_path),
        fusion=model.network.fusion.clone(drop_path=options.drop_path),
    )
    kind, dtype = train.kind, network.backbone.compute_dtype
    if kind in MAPS:
        num_logits = 1 if kind == CHANGE else len(train.classes)
        decoder = CellDecoder if fused else UPerNet
        head = decoder(num_logits, options.decoder_width, compute_dtype=dtype)
        cells, per_cell = options.cells or model.cells, windows.label_pixels(train[0])
    else:
        head = LinearHead(len(train.classes))
        cells, per_cell = options.cells or _largest(train, most=2 * model.cells), 1
    window = dict(num_dates={row.name: model.num_dates[row.name] for row in rows}, cells=cells, per_cell=per_cell)
    return Tuned(network, rows, fused, head, kind, per_cell), window


def _start(tuned: Tuned, model: Model, batch: Any, options: Options) -> tuple[State, optax.GradientTransformation]:
    # a copy: the state is donated, and the model stays as it is
    network = jax.tree.map(np.array, {part: model.params[part] for part in tuned.parts})
    shapes = jax.eval_shape(lambda params, batch: forward.encode(tuned, params, batch, None), network, batch)
    if tuned.kind == CHANGE:  # the two dates of a sample become one difference
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((s.shape[0] // 2, *s.shape[1:]), s.dtype), shapes)
    head, statistics = forward.init_head(tuned, shapes, seed=options.seed)
    params = {HEAD: jax.device_get(head)} | ({} if options.freeze else network)
    optimizer = make_optimizer(
        params,
        learning_rate=optim.learning_rate_schedule(
            learning_rate=options.learning_rate,
            final_learning_rate=options.final_learning_rate,
            warmup_steps=options.warmup_steps,
            num_steps=options.num_steps,
        ),
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        depths=tuned.network.backbone.depths,
        fusion_depth=tuned.network.fusion.depth if tuned.fused else 0,
        layer_decay=options.layer_decay,
    )
    frozen = network if options.freeze else {}
    moments = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(optimizer.init, params))
    return State(*(placed(tree) for tree in (params, frozen, jax.device_get(statistics), moments))), optimizer


def _update(tuned: Tuned, optimizer: Any, options: Options, state: State, batch: Any, step: Any) -> tuple[State, Any]:
    drop = tuned.network.backbone.drop_path > 0 and not options.freeze
    drop_key = jax.random.fold_in(jax.random.key(options.seed), step) if drop else None

    def objective(params):
        return forward.loss(tuned, {**state.frozen, **params}, state.statistics, batch, drop_key=drop_key)

    (loss, statistics), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    new = replicated((params, statistics, moments))
    return state.replace(params=new[0], statistics=new[1], optimizer=new[2]), replicated(loss)


def tune(model: Model, train: Examples, test: Examples, *, task: str, options: Options) -> Result:
    """The network and a new head, trained on ``train``; of ``test`` nothing is read but what must be alike.

    The same seed gives the same result on the same devices; on other meshes it is equal up to rounding.

    Raises:
      ValueError: the examples are not of the task or have other classes, an option does not fit the model or the
        mesh, or the loss is not finite any more.
    """
    _check(model, train, test, task, options)
    tuned, window = _prepare(model, train, options)
    batches = windows.training_batches(
        train,
        tuned.rows,
        batch_size=options.batch_size,
        num_steps=options.num_steps,
        seed=options.seed,
        **window,
    )
    update = state = None
    losses = []
    for step, batch in enumerate(batches):
        if state is None:
            state, optimizer = _start(tuned, model, batch, options)
            update = jax.jit(functools.partial(_update, tuned, optimizer, options), donate_argnums=0)
        state, loss = update(state, batch, step)
        losses.append(loss)
        if step % _LOOK_EVERY == 0 or step + 1 == options.num_steps:
            losses = [float(x) for x in losses]
            if not np.isfinite(losses).all():
                raise ValueError(
                    f"options.learning_rate: {options.learning_rate:g} gave a loss that is not finite by update "
                    f"{step + 1}; wanted a lower one, or more warmup_steps"
                )
    return Result(tuned, {**state.frozen, **state.params}, state.statistics, window, options, np.asarray(losses))


# ---- scores


def _logits(tuned: Tuned, params: Any, statistics: Any, batch: Any) -> Any:
    return replicated(forward.logits(tuned, params, statistics, batch, train=False)[0])


_jit_logits = jax.jit(_logits, static_argnums=0)


def _window_logits(
    result: Result, kind: str, items: Iterable[tuple[Example, sliding.Place]], *, count: int
) -> Float[np.ndarray, "N *rest"]:
    """Logits of windows of examples, in order, ``count`` or more; computed a batch at a time, and read ahead of it."""
    shards, found = num_batch_shards(), []
    size = -(-min(result.options.batch_size, count) // shards) * shards

    def read(item: tuple[Example, sliding.Place]) -> windows.Element:
        return windows.read_window(item[0], result.tuned.rows, kind=kind, place=item[1], **result.window)

    elements = ahead(read, items)
    while part := list(itertools.islice(elements, size)):
        batch = windows.stack(part + part[-1:] * (size - len(part)))  # one shape, one compilation
        found.append(np.asarray(_jit_logits(result.tuned, result.params, result.statistics, batch))[: len(part)])
    return np.concatenate(found)


def map_logits(result: Result, example: Example, *, kind: str) -> Iterator[tuple[int, Float[np.ndarray, "H W L"]]]:
    """Strips of logits of an example from north to south, each with its first row (sliding.blended)."""
    return sliding.blended(
        lambda places: _window_logits(result, kind, [(example, place) for place in places], count=len(places)),
        extent=(example.before.extent_cells,) * 2,
        cells=result.window["cells"],
        per_cell=result.window["per_cell"],
        overlap=result.options.overlap,
        weighting=result.options.weighting,
    )


def _sample_logits(result: Result, examples: Examples) -> Float[np.ndarray, "N L"]:
    """Logits of whole samples: the mean over their windows."""
    counts: list[int] = []

    def items() -> Iterator[tuple[Example, sliding.Place]]:
        for example in examples:
            starts = sliding.starts(example.before.extent_cells, result.window["cells"], result.options.overlap)
            counts.append(len(starts) ** 2)
            yield from ((example, place) for place in itertools.product(starts, starts))

    found = _window_logits(result, examples.kind, items(), count=len(examples))
    return np.stack([part.mean(axis=0) for part in np.split(found, np.cumsum(counts)[:-1])])


def evaluate(result: Result, examples: Examples) -> dict[str, float]:
    """Scores by name, of eval/scores.py. A map coarser than cells is scored cell by cell."""
    if examples.kind in MAPS:
        confusion = scores.Confusion(len(examples.classes))
        for example in examples:
            target = windows.label_map(example, per_cell=result.window["per_cell"])
            for first, strip in map_logits(result, example, kind=examples.kind):
                said = strip.argmax(-1) if examples.kind != CHANGE else (strip[..., 0] > 0).astype(np.int64)
                confusion.add(target[first : first + len(strip)], said)
        if examples.kind == CHANGE:
            return scores.change_scores(confusion)
        return scores.segmentation_scores(confusion, examples.classes, left_out=result.options.left_out)
    targets, found = np.stack([example.target for example in examples]), _sample_logits(result, examples)
    if examples.kind == MULTI_LABEL:
        return scores.multi_label_scores(targets, found)
    assert examples.kind == SCENE, examples.kind
    return scores.scene_scores(targets, found.argmax(1), found)


def finetune(
    model: Model, train: Examples, test: Examples, *, task: str, options: Options = Options()
) -> dict[str, float]:
    """Scores on ``test``, by the names of eval/scores.py, of the network fine-tuned on ``train``.

    ``task`` is the kind of the examples: "scene" and "multi_label" put a linear head on the mean over cells,
    "segmentation" and "change" UPerNet on the maps of the stages, or a small decoder on fused features. Raises as
    ``tune``.
    """
    return evaluate(tune(model, train, test, task=task, options=options), test)
