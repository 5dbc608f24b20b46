"""Partial sums [S, M, N], which a split product leaves to the kernel that reads them.

In f16 they are half the bytes that a launch writes and the next one reads, for a rounding like that of every activation.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.finite import narrowed


def sums_dtype(halves: bool) -> jnp.dtype:
    """f16 for halves, else f32."""
    return jnp.dtype(jnp.float16 if halves else jnp.float32)


def stored(values: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The sums in `dtype`; NaN where they leave its range."""
    return values if dtype == values.dtype else narrowed(values, dtype)


def add_up(partials: Float[Array, "S M N"]) -> Float[Array, "M N"]:
    """The sum in f32, in order of S, so that it is the same on every run.

    Spelled as S - 1 additions: XLA fuses those into whatever reads the result, a reduction gets a launch of its own.
    """
    total = partials[0].astype(jnp.float32)
    for part in range(1, partials.shape[0]):
        total = total + partials[part].astype(jnp.float32)
    return total
