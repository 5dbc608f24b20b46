"""The order of a few values by comparing every pair, which XLA fuses where it would call a library to sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.top_k import order


def ranks(values: Float[Array, "C"]) -> Int32[Array, "C"]:
    """See `api.ranks`."""
    keys, index = order.keys(values), jnp.arange(values.shape[0])
    ahead = (keys > keys[:, None]) | ((keys == keys[:, None]) & (index < index[:, None]))
    return jnp.sum(ahead, axis=1, dtype=jnp.int32)


def top_k(values: Float[Array, "C"], k: int) -> tuple[Float[Array, "k"], Int32[Array, "k"]]:
    """See `api.top_k_small`."""
    here = ranks(values) == jnp.arange(k)[:, None]
    # The values' bits, of which a sum keeps the sign of a zero.
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    best, indices = (jnp.sum(jnp.where(here, each, 0), axis=1, dtype=jnp.int32)
                     for each in (bits, jnp.arange(values.shape[0])))
    return jax.lax.bitcast_convert_type(best, jnp.float32), indices


def sorted_ranks(values: Float[Array, "C"]) -> Int32[Array, "C"]:
    """`ranks` by sorting, faster on a CPU."""
    count = values.shape[0]
    sequence = jax.lax.top_k(values, count)[1]
    return jnp.zeros(count, jnp.int32).at[sequence].set(jnp.arange(count, dtype=jnp.int32))
