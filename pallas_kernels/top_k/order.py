"""Floats as integers of the same order, which leave room below -inf for a value that is already taken."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

TAKEN = jnp.iinfo(jnp.int32).min


def keys(values: Float[Array, "..."]) -> Int32[Array, "..."]:
    """Integers in the total order of f32 `values`, that of `lax.top_k`: -0 stands below 0."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
