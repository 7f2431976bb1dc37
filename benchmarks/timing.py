"""Wall-clock of several functions in one run, in turns: machines are shared, so only their ratio means something."""

import time

import numpy as np


def median_seconds(runs, repeats):
    """Median wall-clock of each of ``runs``, taken in turns, after one call each that does not count."""
    times = []
    for _ in range(repeats + 1):
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    return np.median(times[1:], axis=0)
