"""What the kernel tests share: the implementations to compare, how they are called, and the measure of their error."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

IMPLEMENTATIONS = ["reference", "interpret", pytest.param("kernel", marks=pytest.mark.gpu)]


def compiled(function: Callable, *operands: Any, **options: Any) -> Any:
    """What a function makes of its operands with some options, in one program, as in decoding."""
    return jax.jit(functools.partial(function, **options))(*operands)


def relative_error(value, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of `expected`, in f64; NaN anywhere gives NaN."""
    value = np.asarray(value).astype(np.float64)
    assert value.shape == expected.shape
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
