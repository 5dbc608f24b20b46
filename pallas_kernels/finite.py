"""Numbers that leave a dtype's range become NaN, so that what is computed from them never looks like a result.

An infinity could vanish, as exp(-inf) does, and the largest number of the dtype would be a wrong one. On a GPU `jnp.maximum`
and reductions by it drop a NaN, so comparisons and selections stand here instead.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def fits(values: Float[Array, "*shape"], dtype: jnp.dtype) -> Bool[Array, "*shape"]:
    """Which values are finite and within the range of `dtype`."""
    return jnp.abs(values) <= float(jnp.finfo(dtype).max)


def narrowed(values: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Rounded to `dtype`; NaN where the value leaves its range."""
    return jnp.where(fits(values, dtype), values, jnp.nan).astype(dtype)


def magnitudes(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """|values|, infinite where a value is not a number, so that the largest of them tells."""
    return jnp.where(fits(values, values.dtype), jnp.abs(values), jnp.inf)
