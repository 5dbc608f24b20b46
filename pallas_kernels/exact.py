"""f32 arithmetic whose bits follow from the operands alone, whatever program and however many rows surround it.

IEEE operations are exact functions of their operands, but a compiler is free in two things: it may fuse a product with
the addition behind it, which then rounds once and not twice, and it may add up a row in any order.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

_LARGEST = float(jnp.finfo(jnp.float32).max)


def rounded(product: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A product that no addition behind it is fused with; an infinite one becomes the largest number."""
    return jnp.clip(product, -_LARGEST, _LARGEST)


def row_sums(values: Float[Array, "*M D"]) -> Float[Array, "*M 1"]:
    """The sum of each row, halves added to each other until one value is left.

    The values must not be products that an addition could be fused with (see `rounded`).
    """
    while (columns := values.shape[-1]) > 1:
        if columns % 2:
            values = jnp.concatenate([values, jnp.zeros_like(values[..., :1])], axis=-1)
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values
