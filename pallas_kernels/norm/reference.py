"""Residual addition and RMSNorm in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.partials import add_up


def add_rms_norm(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None, weight: Float[Array, "D"], *,
                 eps: float, out_dtype: jnp.dtype, reproducible: bool = False
                 ) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """See `api.add_rms_norm`."""
    if partials is not None:
        residual = residual + add_up(partials)
    if reproducible:  # a CPU adds up 16 rows in another order than one
        mean_square = jax.lax.map(lambda row: jnp.mean(row * row, keepdims=True), residual)
    else:
        mean_square = jnp.mean(residual * residual, axis=-1, keepdims=True)
    return residual, (residual * jax.lax.rsqrt(mean_square + eps) * weight).astype(out_dtype)
