"""Writes a page that explains a run: ``python -m skysense_jax.eval.report RUN [--out=FILE.html]``.

One file of HTML without script, its pictures inside: how the run went, features as colours in every modality, what the
queries select, where experts work, neighbours across modalities, scores with modalities and dates missing. RUN is the
--workdir of skysense_jax.train, a directory or gs://bucket/name. Next: explain/report.py.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from absl import logging

from skysense_jax.explain.loading import find_places, load
from skysense_jax.explain.places import RECORDS, SCENES
from skysense_jax.explain.report import report
from skysense_jax.storage import in_bucket

_SAMPLES_HELP = (
    "places to look at: procedural scenes that the run did not train on, or records of its sources; scenes by default "
    "if it trained on scenes, else records"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m skysense_jax.eval.report", description="A page that explains a run, in one file."
    )
    parser.add_argument("run", metavar="RUN", help="the --workdir of skysense_jax.train; also gs://bucket/name")
    parser.add_argument("--step", help="of the checkpoint, or best (of probes); the newest by default")
    parser.add_argument("--out", type=pathlib.Path, help="the page; RUN/report.html if left out")
    parser.add_argument("--samples", choices=(SCENES, RECORDS), help=_SAMPLES_HELP)
    parser.add_argument("--num_train", type=int, default=48, help="places that probes are fitted on")
    parser.add_argument("--num_test", type=int, default=24, help="others that they are scored on")
    parser.add_argument("--num_shown", type=int, default=4, help="of those, in pictures")
    given = parser.parse_args(arguments)
    if min(given.num_train, given.num_test, given.num_shown) < 1:
        parser.error("--num_train, --num_test, --num_shown: wanted 1 or more")
    if given.out is None and in_bucket(given.run):
        parser.error("--out: wanted a file of this machine for the report of a run in a bucket")
    out = given.out or pathlib.Path(given.run) / "report.html"
    if given.out is not None and (out.is_dir() or not out.parent.is_dir()):
        parser.error(f"--out: got {out}; wanted a file in a folder that there is")  # before minutes of work
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a manager which only reads does not write
    try:
        run = load(given.run, step=given.step)
        places = find_places(run, given.samples, num_train=given.num_train, num_test=given.num_test)
        text = report(run, places, num_shown=given.num_shown)
        unfinished = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, out)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{out}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
