"""One process of two, of which number 1 fails after the start while number 0 waits for it in an exchange."""

import pathlib
import sys

import jax
from absl import app, flags
from jax.experimental import multihost_utils

from skysense_jax import config
from skysense_jax.launch import start


def main(argv: list[str]) -> None:
    """Fails, or waits."""
    del argv
    with start.started(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)):
        multihost_utils.sync_global_devices("both are here")
        if jax.process_index() == 1:
            raise RuntimeError("the disk of this process is full")
        multihost_utils.sync_global_devices("never")


if __name__ == "__main__":
    config.define_flag()
    flags.DEFINE_string("workdir", None, "As in training.")
    sys.path.append(str(pathlib.Path(__file__).parents[1]))
    app.run(main, flags_parser=config.parse_flags)
