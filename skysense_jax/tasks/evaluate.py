"""A trained network on a labelled dataset, from what the command says to a table and a file of results.

Everything that can be wrong is looked for before the first image is encoded. Next: frozen.py, which does the work.
"""

import dataclasses
import glob
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from skysense_jax.ingest.tfds_sets import S2_L1C
from skysense_jax.modalities import MODALITIES, Modality
from skysense_jax.tasks import cards, finetune, folders, frozen, recordsets
from skysense_jax.tasks.cards import CARDS, RECORDS, Card
from skysense_jax.tasks.examples import KINDS, MAPS, MULTI_LABEL, Examples, check, take_share
from skysense_jax.tasks.loading import Model, load

FINETUNE = "finetune"
PROTOCOLS = (*frozen.PROTOCOLS, FINETUNE)
TILE_CELLS, TUNED_TILE_CELLS = 16, 64  # sides of parts; windows of fine-tuning overlap within theirs
_LOOKED = 16  # examples of a split of which it is looked whether they have anything to read
_COARSEST_M = 2 * 10 / MODALITIES["hr"].pixels_per_cell  # of pixels that hr takes
_NOTE = "published by others, fine-tuned on the whole protocol; not run here"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command says; each field is a flag of ``python -m skysense_jax.eval``, and told there."""

    model: str
    dataset: str
    step: str | None = None
    task: str | None = None
    protocol: str = frozen.KNN
    label_share: float = 1.0
    train_share: float | None = None
    modalities: tuple[str, ...] = ()
    gsd_m: float | None = None
    l1c_as_s2: bool = False
    tile_cells: int | None = None
    max_cells: int = 20_000
    batch_size: int = 8
    seed: int = 0
    tune: tuple[str, ...] = ()
    out: pathlib.Path | None = None


def evaluate(request: Request) -> dict[str, Any]:
    """The result as JSON has it; written to ``request.out`` too, if it is given.

    Raises:
      ValueError: what is asked for cannot be done; says which flag or file to change.
      RuntimeError: no checkpoint of the model verifies.
    """
    _check_flags(request)
    card, place = asked_dataset(request)
    _check_used(request, card)
    tuning = _tuning(request, card) if request.protocol == FINETUNE else None
    model = load(request.model, modalities=request.modalities or None, step=request.step)
    if tuning and card.label and request.tile_cells and request.tile_cells < (tuning.cells or model.cells):
        raise ValueError(
            f"--tile_cells: got {request.tile_cells}; wanted the {tuning.cells or model.cells} cells of a window of "
            "fine-tuning, or more"
        )
    model, splits = labelled(
        request, model, card, place, checked=not tuning
    )  # fine-tuning looks at what it gets itself
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
    train, test = (splits[split] for split in folders.SPLITS)
    if tuning:
        scores = finetune.finetune(model, train, test, task=card.kind, options=tuning)
    else:
        options = frozen_options(request, card)
        scores = frozen.evaluate(model, train, test, options, protocols=(request.protocol,))[request.protocol]
    train_share = None if _has_split(card, place) else request.train_share or card.train_shares[0]
    result = _result(request, card, model, train, test, train_share, scores)
    result["unseen"] = unseen_rows(model, card, place, request)
    result["bare"] = {} if card.sources else {split: bare_share(part, model) for split, part in splits.items()}
    if request.out is not None:
        (request.out / file_name(result)).write_text(json.dumps(result, indent=2) + "\n")
    return result


def asked_dataset(request: Request) -> tuple[Card, pathlib.Path]:
    """The card, with what the flags say, and the place of the dataset; raises ValueError where they contradict it."""
    card, place = find_dataset(request.dataset)
    card = _adapted(card, request)
    if request.train_share is not None and _has_split(card, place):
        raise ValueError(f"--train_share: got {request.train_share:g}; {card.name} has a split; wanted --label_share")
    return card, place


def labelled(
    request: Request, model: Model, card: Card, place: pathlib.Path, *, checked: bool = True
) -> tuple[Model, dict[str, Examples]]:
    """The model with the rows that the dataset has, and examples per split, of which a share is trained on.

    Raises:
      ValueError: they have no row in common, or the dataset is not what its card says; ``checked``: nor its targets.
    """
    rows = shared_rows(model, card, place, request)
    model = dataclasses.replace(model, rows=tuple(row for row in model.rows if row in rows.values()))
    splits = _read(card, place, rows, request)
    for split, examples in splits.items():
        if not len(examples):
            raise ValueError(f"--dataset: no example in {split}")
        if checked:
            check(examples, split=split)
        if not card.sources and bare_share(examples, model) == 1:
            names = ", ".join(row.name for row in model.rows)
            raise ValueError(f"--dataset: {examples[0].id!r} and all others looked at in {split} have none of {names}")
    most = lambda name, count: max(examples.num_dates.get(name, count) for examples in splits.values())  # noqa: E731
    num_dates = {name: min(count, most(name, count)) for name, count in model.num_dates.items()}  # more are padding
    model = dataclasses.replace(model, num_dates=num_dates)
    train = take_share(splits[folders.TRAIN], request.label_share, seed=request.seed)
    if checked:
        frozen.check_classes(train)
    return model, {**splits, folders.TRAIN: train}


def frozen_options(request: Request, card: Card) -> frozen.Options:
    """What the flags and the card say of the use of frozen features."""
    return frozen.Options(
        batch_size=request.batch_size, max_cells=request.max_cells, seed=request.seed, left_out=card.left_out
    )


def _check_flags(request: Request) -> None:
    if request.protocol not in PROTOCOLS:
        raise ValueError(f"--protocol: got {request.protocol!r}; wanted one of {', '.join(PROTOCOLS)}")
    if request.task is not None and request.task not in KINDS:
        raise ValueError(f"--task: got {request.task!r}; wanted one of {', '.join(KINDS)}")
    if request.tune and request.protocol != FINETUNE:
        raise ValueError(f"--tune: got {request.tune[0]!r} with --protocol={request.protocol}; wanted {FINETUNE}")
    for flag in ("batch_size", "max_cells") if request.protocol == FINETUNE else ():
        if (got := getattr(request, flag)) != getattr(Request, flag):
            raise ValueError(
                f"--{flag}: got {got} with --protocol={FINETUNE}; wanted it with frozen features, or --tune=FIELD=VALUE"
            )
    for flag in ("label_share", "train_share"):
        share, all_too = getattr(request, flag), flag == "label_share"
        if share is not None and not (0 < share < 1 or (all_too and share == 1)):
            raise ValueError(f"--{flag}: got {share:g}; wanted above 0, {'at most' if all_too else 'below'} 1")
    for flag in ("tile_cells", "max_cells", "batch_size"):
        if getattr(request, flag) is not None and getattr(request, flag) < 1:
            raise ValueError(f"--{flag}: got {getattr(request, flag)}; wanted 1 or more")
    if request.gsd_m is not None and not 0 < request.gsd_m <= _COARSEST_M:
        raise ValueError(f"--gsd_m: got {request.gsd_m:g}; wanted above 0, at most {_COARSEST_M:g}: hr stretches by 2")
    if request.out is not None and request.out.exists() and not request.out.is_dir():
        raise ValueError(f"--out: {request.out} is a file; wanted a folder")


def find_dataset(text: str) -> tuple[Card, pathlib.Path]:
    """The card and the place that NAME:DIR or DIR says: of a known dataset, of a card.json in DIR, or of records, whose
    files a glob may name.

    Raises:
      ValueError: no such card, or DIR says nothing of itself.
    """
    name, colon, rest = text.partition(":")
    if colon:
        if name not in CARDS:
            raise ValueError(f"--dataset: no card {name!r}; wanted one of {', '.join(CARDS)}, or DIR with {cards.FILE}")
        return CARDS[name], pathlib.Path(rest)
    place = pathlib.Path(text)
    if (place / cards.FILE).exists():
        return cards.read(place / cards.FILE), place
    if glob.has_magic(place.name) or (place.is_dir() and any(place.glob("*.array_record"))):
        return CARDS[RECORDS], place
    told = f"has neither {cards.FILE} nor records" if place.is_dir() else "is no folder"
    raise ValueError(f"--dataset: {place} {told}; wanted NAME:DIR with a NAME of {', '.join(CARDS)}")


def _adapted(card: Card, request: Request) -> Card:
    """The card with what the flags say; raises ValueError where they contradict it."""
    if card.name == RECORDS:
        if request.task is None:
            raise ValueError(f"--task: missing; records do not say theirs; wanted one of {', '.join(KINDS)}")
        card = dataclasses.replace(card, kind=request.task)
    if request.task not in (None, card.kind):
        raise ValueError(f"--task: got {request.task}; the card {card.name!r} is of {card.kind}")
    if card.kind == MULTI_LABEL and request.protocol == frozen.KNN:
        raise ValueError(f"--protocol: {frozen.KNN} gives one class an image; wanted {frozen.LINEAR} for {MULTI_LABEL}")
    if request.gsd_m is not None:
        if all(source.format != cards.RGB for source in card.sources.values()):
            raise ValueError(f"--gsd_m: got {request.gsd_m:g}; the size of {card.name}'s pixels is known")
        card = dataclasses.replace(card, gsd_m=request.gsd_m)
    return card


def _check_used(request: Request, card: Card) -> None:
    """Nothing, if what is asked for changes anything for this dataset."""
    if request.l1c_as_s2 and not card.sources:
        raise ValueError("--l1c_as_s2: records are of the row that they were written with; say it to from_tfds")
    if request.tile_cells is not None and not card.label:
        raise ValueError(f"--tile_cells: got {request.tile_cells}; only images with maps in folders are cut into parts")
    if request.max_cells != Request.max_cells and card.kind not in MAPS:
        raise ValueError(f"--max_cells: got {request.max_cells}; {card.kind} is fitted on one feature an image")


def _has_split(card: Card, place: pathlib.Path) -> bool:
    """Whether the card or the folder says what is to train on."""
    return bool(card.splits or card.members) if card.sources else recordsets.has_split(place)


def shared_rows(model: Model, card: Card, place: pathlib.Path, request: Request) -> Mapping[str, Modality]:
    """The model's rows of what the dataset has, by the dataset's names for them.

    Raises:
      ValueError: there is none, or one that was asked for is not in the dataset.
    """
    known = {row.name: row for row in model.rows}
    has = _row_names(card, place) or list(known)
    rows = {name: known[name] for name in has if name in known}
    if S2_L1C.name in has and S2_L1C.name not in known and request.l1c_as_s2 and "s2" in known and "s2" not in has:
        rows[S2_L1C.name] = known["s2"]
    if request.l1c_as_s2 and rows.get(S2_L1C.name, S2_L1C).name != "s2":
        raise ValueError(
            f"--l1c_as_s2: {card.name} has {', '.join(has)}, the model reads {', '.join(known)}; wanted a dataset with "
            f"{S2_L1C.name} and a model with s2 alone"
        )
    absent = [name for name in request.modalities if name not in {row.name for row in rows.values()}]
    if absent:
        raise ValueError(f"--modalities: {card.name} has no {', '.join(absent)}; it has {', '.join(has)}")
    if not rows:
        hint = "; --l1c_as_s2 takes Level-1C for s2" if has == [S2_L1C.name] and "s2" in known else ""
        raise ValueError(
            f"--dataset: {card.name} has {', '.join(has)}, which the model has never seen: it has "
            f"{', '.join(row.name for row in model.network.backbone.modalities)}{hint}"
        )
    return rows


def unseen_rows(model: Model, card: Card, place: pathlib.Path, request: Request) -> list[str]:
    """Rows of the dataset that the network was not trained with, so that they are not read."""
    seen = {*(row.name for row in model.network.backbone.modalities), *shared_rows(model, card, place, request)}
    return [name for name in _row_names(card, place) if name not in seen]


def _row_names(card: Card, place: pathlib.Path) -> list[str]:
    return list(card.sources) or [row.name for row in recordsets.modalities_of(place)]


def _read(card: Card, place: pathlib.Path, rows: Mapping[str, Modality], request: Request) -> dict[str, Examples]:
    how = dict(train_share=request.train_share or card.train_shares[0], seed=request.seed)
    if card.sources:
        tile_cells = request.tile_cells or (TUNED_TILE_CELLS if request.protocol == FINETUNE else TILE_CELLS)
        overlapping = request.protocol == FINETUNE
        return folders.read(place, card, rows=rows, tile_cells=tile_cells, overlapping=overlapping, **how)
    return recordsets.read(place, kind=card.kind, rows=list(rows.values()), num_classes=card.num_classes, **how)


def bare_share(examples: Examples, model: Model) -> float:
    """Of a few records, evenly spaced, the share of those that have nothing that the model reads."""
    places = np.linspace(0, len(examples) - 1, min(_LOOKED, len(examples))).astype(int).tolist()
    read = lambda sample: any(len(sample.days(row.name)) for row in model.rows)  # noqa: E731
    return float(np.mean([not read(examples[place].before) for place in places]))


def _tuning(request: Request, card: Card) -> finetune.Options:
    """What ``--tune`` says of fine-tuning; raises ValueError for what is no field of ``finetune.Options``."""
    default = {field.name: field.default for field in dataclasses.fields(finetune.Options)}
    known = default.keys() - {"left_out", "seed"}
    found: dict[str, Any] = dict(left_out=card.left_out, seed=request.seed)
    for entry in request.tune:
        name, equals, text = entry.partition("=")
        if name not in known or not equals:
            raise ValueError(f"--tune: got {entry!r}; wanted FIELD=VALUE with a FIELD of {', '.join(sorted(known))}")
        wanted: type = type(default[name])
        try:
            found[name] = {"true": True, "false": False}[text.lower()] if wanted is bool else wanted(text)
        except (ValueError, KeyError) as error:
            kinds = {bool: "True or False", int: "a whole number", float: "a number"}
            raise ValueError(f"--tune: {name}: got {text!r}; wanted {kinds[wanted]}") from error
    try:
        return finetune.Options(**found)
    except ValueError as error:
        raise ValueError(f"--tune: {error}") from error


def _result(
    request: Request,
    card: Card,
    model: Model,
    train: Examples,
    test: Examples,
    train_share: float | None,
    scores: Mapping[str, float],
) -> dict[str, Any]:
    return dict(
        model=dict(place=str(request.model), name=model.name),
        dataset=dict(card=card.name, place=request.dataset, classes=list(train.classes)),
        task=card.kind,
        protocol=request.protocol,
        modalities=[row.name for row in model.rows],
        train_share=train_share,
        label_share=request.label_share,
        seed=request.seed,
        num_train=len(train),
        num_test=len(test),
        asked={name: value for name, value in dataclasses.asdict(request).items() if name != "out"},
        scores={name: value if math.isfinite(value) else None for name, value in scores.items()},
        published=[dict(dataclasses.asdict(figure), note=_NOTE) for figure in card.published],
    )


def file_name(result: Mapping[str, Any]) -> str:
    """Of a result: one of another model, step, dataset or anything else that was asked for has another."""
    shares = "".join(f"-{name}{result[name]:g}" for name in ("train_share", "label_share") if result[name] is not None)
    parts = (result["dataset"]["card"], result["task"], result["protocol"], "_".join(result["modalities"]))
    name = re.sub(r"[^\w.\-]", "_", "-".join(parts)) + shares.replace("_share", "") + f"-seed{result['seed']}"
    of_all = json.dumps([result["model"], result["asked"]], sort_keys=True)
    return f"{name}-{hashlib.sha256(of_all.encode()).hexdigest()[:8]}.json"


def table(result: Mapping[str, Any]) -> str:
    """A result as lines for a person; scores in per cent."""
    share = f", {result['label_share']:.3g} of the labels" if result["label_share"] < 1 else ""
    unseen = f"; not read, as it has never seen them: {', '.join(result['unseen'])}" if result["unseen"] else ""
    lines = [
        f"model     {result['model']['name']} ({', '.join(result['modalities'])}){unseen}",
        f"dataset   {result['dataset']['card']}, {result['task']}, {len(result['dataset']['classes'])} classes; "
        f"{result['num_train']} to train on{share}, {result['num_test']} to test on",
        f"protocol  {result['protocol']} on frozen features, seed {result['seed']}"
        if result["protocol"] != FINETUNE
        else f"protocol  {FINETUNE}, seed {result['seed']}",
        "",
        *(
            f"  {name:28} {'-' if value is None else format(100 * value, '.2f'):>7} %"
            for name, value in result["scores"].items()
        ),
    ]
    if any(result["bare"].values()):
        shares = " and ".join(f"{share:.0%} of the {split}" for split, share in result["bare"].items())
        names = ", ".join(result["modalities"])
        lines += ["", f"{shares} examples looked at ({_LOOKED} at most) have none of {names}"]
    if result["published"]:
        lines += ["", f"{_NOTE}:"]
        lines += [
            f"  {f['method']:14} {f['setting']:16} {f['metric']:8} {f['value']:7.2f} %" for f in result["published"]
        ]
    return "\n".join(lines)
