"""What the kernel tests share: the implementations to compare, and the measure of their error."""

import numpy as np
import pytest

IMPLEMENTATIONS = ["reference", "interpret", pytest.param("kernel", marks=pytest.mark.gpu)]


def relative_error(value, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of `expected`, in f64; NaN anywhere gives NaN."""
    value = np.asarray(value).astype(np.float64)
    assert value.shape == expected.shape
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
