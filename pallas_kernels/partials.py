"""Partial sums [S, M, N], which a split product leaves to the kernel that reads them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def add_up(partials: Float[Array, "S M N"]) -> Float[Array, "M N"]:
    """The sum in f32, in order of S, so that it is the same on every run.

    Spelled as S - 1 additions: XLA fuses those into whatever reads the result, a reduction gets a launch of its own.
    """
    total = partials[0].astype(jnp.float32)
    for part in range(1, partials.shape[0]):
        total = total + partials[part].astype(jnp.float32)
    return total
