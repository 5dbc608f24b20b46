"""Curves of costs."""

import math

import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st

from specmq_jax.decoding.costs.table import Curve, Span, isotonic


@lengths
def test_a_curve_never_falls_and_lies_nearest_to_what_was_measured(examples):
    @searching(examples)
    @given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=12))
    def check(values):
        found = isotonic(values)
        assert all(left <= right * (1 + 1e-9) for left, right in zip(found, found[1:], strict=False))
        assert math.fsum(found) == pytest.approx(math.fsum(values)) and len(found) == len(values)
        assert isotonic(sorted(values)) == tuple(sorted(values))
        level = math.fsum(values) / len(values)  # a constant does not fall either, and lies no nearer
        assert sum((f - v) ** 2 for f, v in zip(found, values, strict=True)) <= 1e-6 + sum((level - v) ** 2 for v in values)

    check()
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == (1.0, 2.5, 2.5, 4.0)


def test_a_curve_says_how_far_it_is_from_what_was_measured():
    spans = [Span(median=median, fastest=0.9 * median, slowest=2 * median) for median in (1.0, 3.0, 2.0)]
    curve = Curve.rising((1, 2, 4), spans)
    assert curve.seconds == (1.0, 2.5, 2.5) and curve.fall == pytest.approx(0.2)
    assert curve.fastest(1) == 0.9 and curve.slowest(1) == 2.0 and Curve(at=(1,), seconds=(5.0,)).fall == 0.0
