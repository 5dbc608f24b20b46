"""How long the property tests search: a little in every run, much longer under the marker `slow`."""

import pytest
from hypothesis import HealthCheck, settings

SHORT, LONG = 60, 1000
lengths = pytest.mark.parametrize("examples", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
"""For tests whose argument `examples` goes into `searching`."""


def searching(examples: int) -> settings:
    """Settings of a property's search: the same cases every time in a short one, others each time in a long one."""
    return settings(max_examples=examples, derandomize=examples <= SHORT, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))
