"""Per-token 8-bit activations and their product with 8-bit integers, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels.finite import fits

LARGEST = 127
GROUP = 128
"""Columns whose codes are summed together."""


def quantise_rows(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float[Array, "M"]]:
    """See `api.quantise_rows`."""
    values = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=1)
    largest = jnp.where(fits(largest, jnp.float32), largest, jnp.nan)
    steps = jnp.where(largest == 0, 0.0, LARGEST / largest)  # a row of zeros stays one
    codes = jnp.clip(jnp.round(values * steps[:, None]), -LARGEST, LARGEST)
    return codes.astype(jnp.int8), largest / LARGEST


def sums(codes: Int8[Array, "M K"], columns: int) -> Int32[Array, "G M"]:
    """Of `columns` codes each, the last of what is left; -1 is all."""
    if columns == -1:
        return jnp.sum(codes, axis=1, dtype=jnp.int32)[None]
    padded = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % columns)))
    return jnp.sum(padded.reshape(len(codes), -1, columns), axis=2, dtype=jnp.int32).T


def product(q: Int8[Array, "M K"], values: Int8[Array, "N K"]) -> Int32[Array, "M N"]:
    """The exact sum of products."""
    return jax.lax.dot_general(q, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
