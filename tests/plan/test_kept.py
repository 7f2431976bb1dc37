"""Plans that are kept are of the configs as they are now; what a compiler said then is compared by hand."""

import ast
import pathlib
import shlex

import pytest

from skysense_jax import config as config_lib
from skysense_jax import targets
from skysense_jax.plan import __main__ as command

ROOT = pathlib.Path(__file__).parents[2]
KEPT = sorted((ROOT / "docs" / "plans").glob("*.txt"))


def test_some_plans_are_kept():
    assert KEPT


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_plan_is_of_the_config_as_it_is(path):
    first, text = path.read_text().split("\n", 1)
    assert first.startswith("$ python -m skysense_jax.plan ")
    given = dict(arg.removeprefix("--").split("=", 1) for arg in shlex.split(first)[4:] if "=" in arg)
    config, target = config_lib.load(given.pop("config")), targets.parse(given.pop("target"))
    for field, value in given.items():
        *sections, key = field.removeprefix("config.").split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value if isinstance(section[key], str) else ast.literal_eval(value)
    config_lib.validate(config, num_devices=target.num_chips)
    wanted = config_lib.fingerprint(config, command.PLANNED)
    assert f"config {wanted}" in text, f"the config has changed: make the plan again: {first[2:]}"
    assert f"{target.num_chips} x {target.chip.name}" in text
    assert ("--quick" in first) == ("compiled quickly" in text)
