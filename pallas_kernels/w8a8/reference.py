"""Per-token 8-bit activations and their product with 8-bit integers, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

LARGEST = 127


def quantise_rows(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float[Array, "M"]]:
    """See `api.quantise_rows`."""
    values = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=1)
    steps = jnp.where(largest == 0, 0.0, LARGEST / largest)  # a row of zeros stays one
    codes = jnp.clip(jnp.round(values * steps[:, None]), -LARGEST, LARGEST)
    return codes.astype(jnp.int8), largest / LARGEST


def product(q: Int8[Array, "M K"], values: Int8[Array, "N K"]) -> Int32[Array, "M N"]:
    """The exact sum of products."""
    return jax.lax.dot_general(q, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
