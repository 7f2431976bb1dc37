"""Would a run start here: ``python -m skysense_jax.preflight --config=configs/base.py --workdir=RUN``.

Started like the training itself, in every process, it makes the same checks (launch/start.py), prints the report on
process 0 and stops: with 0 if the run may start, with 1 on every process if not.
"""

import sys

import jax
from absl import app, flags, logging

from skysense_jax import config as config_lib
from skysense_jax import storage
from skysense_jax.launch import start
from skysense_jax.launch.roll_call import StartError


def main(argv: list[str]) -> None:
    """Checks, and says so."""
    if len(argv) > 1:
        raise app.UsageError(f"got {argv[1:]}; wanted --config=FILE --workdir=DIR")
    logging.set_verbosity(logging.INFO)
    try:
        with start.started(flags.FLAGS.config, storage.run_directory(flags.FLAGS.workdir)):
            if jax.process_index() == 0:
                print("preflight: the run may start")
    except (StartError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    config_lib.define_flag()
    flags.DEFINE_string("workdir", None, "Where the run will be.", required=True)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=config_lib.parse_flags)
