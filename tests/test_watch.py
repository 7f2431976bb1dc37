"""Jumps of a loss and collapse, told from noise: by made-up courses of numbers."""

import math

import numpy as np
import pytest

from skysense_jax.watch import Collapses, LossSpikes


def _course(steps, noise=0.05, seed=0):
    """A loss that falls from 10 to 7, with noise."""
    rng = np.random.default_rng(seed)
    return [7 + 3 * math.exp(-step / 100) + noise * rng.standard_normal() for step in range(steps)]


def _spikes(losses, **changes):
    spikes = LossSpikes(**{**dict(window=200, deviations=8.0, in_row=5), **changes})
    return [found for step, loss in enumerate(losses, 1) if (found := spikes.see(step, loss))]


@pytest.mark.parametrize("seed", range(20))
def test_an_ordinary_course_has_no_spike(seed):
    assert _spikes(_course(1000, noise=0.3, seed=seed)) == []


def test_single_bad_batches_and_losses_that_are_not_finite_are_none():
    losses = _course(400)
    losses[100:104] = [50.0] * 4
    losses[200:220] = [math.nan] * 20
    losses[300] = math.inf
    assert _spikes(losses) == []


def test_spike_is_told_behind_its_fifth_step_and_once():
    losses = _course(400)
    losses[300:330] = [12.0] * 30
    first, *rest = _spikes(losses[:305])
    assert (first.first_step, first.last_step, first.loss) == (301, 305, 12.0)
    assert 7 < first.limit < 10
    assert rest == []
    assert _spikes(losses, deviations=0.0) == []


def test_a_jump_within_the_first_losses_is_not_judged():
    assert _spikes([1.0] * 10 + [100.0] * 9) == []
    assert _spikes([1.0] * 20 + [100.0] * 5) != []


def _collapses(numbers, steps, **changes):
    how = dict(num_prototypes=64, num_queries=16, in_row=10, from_step=100)
    watcher = Collapses(**{**how, **changes})
    return [(step, found.signal) for step in steps for found in watcher.see(step, numbers)]


HEALTHY = {  # of `tiny` after 75 steps; query_content after 1200
    "feature_std/hr": 0.277,
    "query_usage": 0.886,
    "query_content": 1.16,
    "target_entropy/hr_pixel": 0.879,
    "target_entropy_of_mean/hr_pixel": 4.069,
    "experts/dropped": 0.1,
    "loss": 9.0,
}


def test_healthy_numbers_and_signals_without_valid_rows_tell_nothing():
    assert _collapses(HEALTHY, range(1, 500)) == []
    assert _collapses(HEALTHY | {"feature_std/hr": 0.0, "target_entropy_of_mean/hr_pixel": 0.0}, range(1, 500)) == []


@pytest.mark.parametrize(
    ("signal", "value"),
    [
        ("feature_std/hr", 0.01),
        ("query_usage", 1 / 16),
        ("query_content", 0.04),
        ("target_entropy/hr_pixel", 0.99 * math.log(64)),
        ("target_entropy_of_mean/hr_pixel", 1.0),
        ("experts/dropped", 0.7),
    ],
)
def test_each_collapse_is_told_ten_steps_behind_the_warm_up_and_once(signal, value):
    assert _collapses(HEALTHY | {signal: value}, range(1, 500)) == [(109, signal)]
    assert _collapses(HEALTHY | {signal: value}, range(1, 500), in_row=0) == []


def test_collapse_is_told_again_when_it_had_recovered():
    watcher = Collapses(num_prototypes=64, num_queries=16, in_row=3, from_step=0)
    told = [step for step in range(1, 13) if watcher.see(step, HEALTHY | {"query_usage": 0.9 if step == 6 else 0.06})]
    assert told == [3, 9]
