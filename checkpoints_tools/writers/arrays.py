"""Large arrays on the host, copied once at most."""

import numpy as np
from jaxtyping import Shaped

_COLUMNS = 64
"""Of a transposed matrix that are copied at a time, so that both sides stay in the processor's cache."""


def contiguous(values: Shaped[np.ndarray, "..."], dtype: np.dtype | None = None) -> Shaped[np.ndarray, "..."]:
    """The values in C order and, where it is given, in that dtype; what is so already is returned itself."""
    dtype = values.dtype if dtype is None else np.dtype(dtype)
    with np.errstate(over="ignore"):
        if values.ndim != 2 or not values.flags.f_contiguous or values.flags.c_contiguous:
            return np.asarray(values, dtype, order="C")
        made = np.empty(values.shape, dtype)
        for start in range(0, values.shape[1], _COLUMNS):
            made[:, start:start + _COLUMNS] = values[:, start:start + _COLUMNS]
    return made
