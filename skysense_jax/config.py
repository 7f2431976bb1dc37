"""Loading, printing and comparing of configs: beside the entry points, the only reader of a config.

An entry point runs ``app.run(main, flags_parser=config.parse_flags)`` with ``CONFIG = config.define_flag()``:
ml_collections itself ends in a traceback when an override is mistyped, ``parse_flags`` with one line that names the
nearest key. Then ``validate(CONFIG.value)`` (config_checks.py) refuses wrong values before anything is compiled.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from skysense_jax.config_checks import ROOT, fields_of, hint, is_section, nodes, resolve_path, validate

__all__ = [
    "Changes",
    "compare",
    "define_flag",
    "fingerprint",
    "flat_text",
    "load",
    "parse_flags",
    "resolve_path",
    "unflatten",
    "validate",
]

# What a resumed run must not change: with another value the saved weights would not fit, or would mean something else.
# ``optim.num_steps`` is not among them: schedules are functions of the step, and training on for longer is common.
_FIXED_ON_RESUME = ("model", "data.modalities", "data.new_modalities")
_CAME_LATER = {"model.backbone.shared": "True", "model.backbone.moe_from": "'end'"}  # what runs without them had
_FREE_ON_RESUME = (  # of the model, but not of its weights
    "model.compute_dtype",
    "model.backbone.drop_path",
    "model.backbone.capacity_factor",
    "model.fusion.drop_path",
)


# ---- loading


def load(source: str | pathlib.Path | ModuleType) -> ConfigDict:
    """The locked, unchecked config of a module or of a file: PATH, or PATH:ARGUMENT for ``get_config(ARGUMENT)``.

    Raises:
      ValueError: there is no such file, or it has no ``get_config``.
    """
    module, argument = source, ""
    if not isinstance(module, ModuleType):
        file, _, argument = str(source).partition(":")
        path = resolve_path(file)
        if not path.is_file():
            names = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
            raise ValueError(f"--config: got {file!r}, which is no file; wanted configs/NAME.py, NAME of {names}")
        spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"--config: got {file!r}; wanted a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {source} has no function get_config()")
    return module.get_config(*([argument] if argument else [])).lock()


def define_flag() -> flags.FlagHolder:
    """The flag ``--config=FILE`` with overrides ``--config.section.key=value``; its value is a ConfigDict."""
    return config_flags.DEFINE_config_file("config", help_string="config file, e.g. configs/tiny.py")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """What is left of ``argv`` after the flags; for ``absl.app.run(main, flags_parser=parse_flags)``.

    A missing config file, a mistyped override or a value of another type ends the program with one line on stderr.
    """
    try:
        try:
            argv = _checked(argv)
        except ValueError as error:
            raise flags.Error(str(error)) from error
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.stderr.write(f"{error}\nNothing was started; configs/base.py lists and explains every field.\n")
        sys.exit(1)


def _resolved(source: str) -> str:
    file, colon, argument = source.partition(":")
    return f"{resolve_path(file)}{colon}{argument}"


def _checked(argv: Sequence[str]) -> list[str]:
    """``argv`` with the config file's path resolved, its overrides being keys of that file."""
    argv, file = list(argv), None
    for i, arg in enumerate(argv):
        if re.fullmatch("--?config", arg) and i + 1 < len(argv):
            file = argv[i + 1] = _resolved(argv[i + 1])
        elif match := re.match("--?config=(.*)", arg):
            file = _resolved(match[1])
            argv[i] = f"--config={file}"
    overrides = [match[1] for arg in argv if (match := re.match(r"--?(?:no)?config\.([^=]+)", arg))]
    if file is None:
        if overrides:
            raise ValueError(f"--config.{overrides[0]}: wanted --config=FILE before it, e.g. --config=configs/tiny.py")
        return argv
    known = dict(nodes(load(file)))
    for field in overrides:
        if field not in known:
            raise ValueError(f"--config.{field}: no such key{hint(field, known)}")
    return argv


# ---- printing and comparing


def _plain(value: Any) -> Any:
    """``value`` of tuples and sorted dicts, so that its text does not depend on how it was written."""
    if is_section(value):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    return value


def flat_text(config: ConfigDict) -> str:
    """One line ``a.b.c = value`` per field, sorted; ends with a newline."""
    return "".join(f"{field} = {_plain(value)!r}\n" for field, value in sorted(fields_of(config).items()))


def unflatten(text: str) -> ConfigDict:
    """The locked config whose ``flat_text`` this is."""
    config = {}
    for line in text.splitlines():
        field, value = line.split(" = ", 1)
        *sections, key = field.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = ast.literal_eval(value)
    return ConfigDict(config).lock()


def fingerprint(config: ConfigDict, sections: Sequence[str] = _FIXED_ON_RESUME) -> str:
    """16 hex digits that change if and only if a field of ``sections`` (dotted sections or fields) does."""
    lines = [line for line in flat_text(config).splitlines() if _is_under(line.partition(" = ")[0], sections)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_under(field: str, sections: Sequence[str]) -> bool:
    return any(field == section or field.startswith(f"{section}.") for section in sections)


@dataclasses.dataclass(frozen=True)
class Changes:
    """Lines "config.a.b: 1 -> 2" of the fields that differ from those a run was started with.

    Attributes:
      refused: the saved weights would not fit, or would mean something else.
      allowed: worth saying, and done.
    """

    refused: tuple[str, ...]
    allowed: tuple[str, ...]


def compare(saved_flat: str, config: ConfigDict) -> Changes:
    """How ``config`` differs from the one whose ``flat_text`` was saved."""
    saved, now = (dict(line.split(" = ", 1) for line in text.splitlines()) for text in (saved_flat, flat_text(config)))
    refused, allowed = [], []
    for field in sorted({*saved, *now}):
        before, after = saved.get(field, _CAME_LATER.get(field, "not there")), now.get(field, "not there")
        if before != after:
            fixed = _is_under(field, _FIXED_ON_RESUME) and field not in _FREE_ON_RESUME
            (refused if fixed else allowed).append(f"config.{field}: {before} -> {after}")
    return Changes(tuple(refused), tuple(allowed))
