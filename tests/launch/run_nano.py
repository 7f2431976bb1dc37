"""Trains as one process of several: ``python run_nano.py RECORDS.json [flags of the trainer]``, but for pictures.

RECORDS.json gets the numbers of the records that this process read, by step. STOP_AFTER=n: the last process tells
itself to stop once n steps are under way.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
from absl import app

from skysense_jax import config, outputs, train


def main(argv: list[str]) -> None:
    """Trains, and notes what was read."""
    path, order, prefetch = pathlib.Path(argv.pop(1)), [], train.prefetch
    stop_after = int(os.environ.get("STOP_AFTER", "0"))

    def watched(*args):
        for batch, element, state in prefetch(*args):
            if stop_after and len(order) == stop_after:
                if jax.process_index() == jax.process_count() - 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(5)  # the others hear of it within a second
            order.append(element["record"].tolist())
            path.write_text(json.dumps(order))
            yield batch, element, state

    train.prefetch, outputs.Outputs.write_pictures = watched, lambda *args: None
    train.main(argv)


if __name__ == "__main__":
    sys.path.append(str(pathlib.Path(__file__).parents[1]))
    app.run(main, flags_parser=config.parse_flags)
