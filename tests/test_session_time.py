"""Tests of session_time: the pace of batches, and how far a session gets, against a walk second by second."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from session_time import FORECAST_AFTER, RECENT, SETTLING, Costs, Pace

PLANS = st.builds(Costs, epoch=st.integers(1, 50).map(float), validation=st.integers(0, 20).map(float),
                  eval_every=st.integers(1, 4), epochs=st.integers(1, 12))  # fmt: skip


def test_pace_is_the_mean_of_recent_batches_without_the_first():
    pace = Pace()
    for n in range(FORECAST_AFTER):
        assert not pace.is_known
        pace.add(100.0 if n < SETTLING else 2.0)
    assert pace.is_known and pace.seconds == 2.0
    for _ in range(RECENT):
        pace.add(3.0)
    assert pace.seconds == 3.0


def test_a_run_by_hand():
    costs = Costs(epoch=10.0, validation=4.0, eval_every=2, epochs=5)
    assert costs.seconds_from(0.0) == 5 * 10 + 3 * 4  # after the second, fourth and last epoch
    assert costs.seconds_from(1.5) == 35 + 3 * 4 and costs.seconds_from(2.0) == 30 + 2 * 4
    assert costs.reached_after(0.0, 15.0) == 1.5
    assert costs.reached_after(0.0, 22.0) == 2.0 and costs.reached_after(0.0, 24.0) == 2.0  # the validation goes on
    assert costs.reached_after(0.0, 25.0) == 2.1
    assert costs.reached_after(0.0, 1e9) == 5.0 and costs.reached_after(2.5, -3.0) == 2.5


@settings(max_examples=60, deadline=None)
@given(PLANS, st.floats(0, 1), st.integers(0, 900))
def test_it_gets_as_far_as_a_walk_in_small_steps(costs, share, seconds):
    position = share * costs.epochs
    reached, left, walked = costs.reached_after(position, seconds), float(seconds), position
    while walked < costs.epochs and left > 0:
        step = min(int(walked) + 1 - walked, left / costs.epoch)
        left -= step * costs.epoch
        walked += step
        if walked == int(walked) and step > 0:
            number = int(walked)
            left -= costs.validation * (number % costs.eval_every == 0 or number == costs.epochs)
    assert reached == pytest.approx(walked, abs=1e-6)
    whole = costs.seconds_from(position)
    assert (reached >= costs.epochs) == (seconds >= whole - costs.validation - 1e-9) or reached == pytest.approx(walked)
    assert costs.reached_after(position, whole) == pytest.approx(costs.epochs, abs=1e-9)
