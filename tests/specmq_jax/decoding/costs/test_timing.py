"""A step's time is the difference of two calls."""

import types

import jax.numpy as jnp
import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st

from specmq_jax.decoding.costs import timing
from specmq_jax.decoding.costs.timing import time_loop, timing_of


def test_a_loop_whose_steps_noise_hides_has_an_upper_bound_for_a_time():
    clear = timing_of([1.0, 1.2], [5.1, 5.3], 5, 9.0)
    assert clear.seconds == pytest.approx((1.0, 1.05)) and not clear.is_bound and clear.call == pytest.approx(0.075)
    hidden = timing_of([1.0, 1.2], [1.0, 5.3], 5, 9.0)
    assert hidden.seconds == pytest.approx((0.2, 1.06)) and hidden.is_bound and hidden.call is None
    assert timing_of([], [2.0], 1, 9.0).seconds == (2.0,)


@lengths
def test_a_step_takes_more_than_no_time(examples):
    @searching(examples)
    @given(st.lists(st.floats(1e-6, 10), min_size=1), st.lists(st.floats(1e-6, 10), min_size=1), st.integers(2, 64))
    def check(short, long, steps):
        found = timing_of(short, long, steps, 1.0)
        assert min(found.seconds) > 0 and (found.call is None or found.call >= 0)

    check()


class Clock:
    """A clock that a call of a loop moves on by what `taken` says of its steps."""

    def __init__(self, taken):
        self.now, self.taken, self.steps = 0.0, taken, []

    def loop(self, params, carry, steps):
        self.steps.append(int(steps))
        self.now += self.taken(int(steps))
        return carry

    def time(self, monkeypatch, **bounds):
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        return time_loop(self.loop, (), jnp.zeros(1), runs=3, **bounds)[0]


def test_what_a_call_takes_besides_its_steps_is_no_part_of_them(monkeypatch):
    found = Clock(lambda steps: 5.0 + 0.25 * steps).time(monkeypatch, least=8)
    assert found.median == pytest.approx(0.25) and found.call == pytest.approx(5.0) and found.steps == 8
    assert Clock(lambda steps: 5.0 + 0.25 * steps).time(monkeypatch, most=1).seconds == (5.25,) * 3


def test_a_run_lasts_long_enough_within_its_bounds(monkeypatch):
    assert Clock(lambda steps: 0.01 * steps).time(monkeypatch).steps == 20
    assert Clock(lambda steps: 0.01 * steps).time(monkeypatch, most=7).steps == 7
    assert Clock(lambda steps: 1e-6 * steps).time(monkeypatch).steps == 64


def test_what_noise_hides_is_tried_with_more_steps_and_then_an_upper_bound(monkeypatch):
    hidden = Clock(lambda steps: 1.0 if steps == 1 else 0.9)
    assert hidden.time(monkeypatch, least=8, most=20).is_bound and sorted(set(hidden.steps)) == [1, 4, 8, 16, 20]
    found = Clock(lambda steps: 1.0 if steps < 16 else 31.0).time(monkeypatch, least=8)
    assert not found.is_bound and found.median == pytest.approx(2.0)
