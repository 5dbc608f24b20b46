"""Equality of logical weights."""

import dataclasses

import numpy as np


def assert_same(found, expected):
    assert type(found) is type(expected)
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=field.name)
