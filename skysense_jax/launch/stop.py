"""Being told to stop: SIGTERM (pre-emption, the end of the time limit) and SIGUSR1 end a run behind a checkpoint.

All processes stop behind the same step, whichever of them got the signal. The exit status tells a launcher to start the
same command again, which goes on from that checkpoint. Next: start.py, launch/README.md.
"""

import os
import signal
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was told to stop, and everything up to now is saved."""


class Stop:
    """Whether the run was told to stop; ``listen`` starts to hear the signals, in the main thread only."""

    def __init__(self):
        self._told, self._reached = threading.Event(), False

    def listen(self) -> None:
        """From here on the signals no longer end this process at once."""
        if jax.process_count() > 1:
            # JAX's own handler of SIGTERM agrees with the other processes on a step; SIGUSR1 is made the same.
            signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        else:
            for number in SIGNALS:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        logging.warning("%s: stopping behind the next step", signal.Signals(number).name)
        self._told.set()

    def reached(self, step: int) -> bool:
        """Whether the run is to stop behind ``step`` or was before: the same on all processes. Asked once a step.

        Orbax asks JAX the same with the run's own steps, and there is one counter for both.
        """
        if jax.process_count() > 1:
            self._reached |= multihost_utils.reached_preemption_sync_point(step)
        else:
            self._reached = self._told.is_set()
        return self._reached
