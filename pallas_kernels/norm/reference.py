"""Residual addition and RMSNorm in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import exact
from pallas_kernels.finite import narrowed
from pallas_kernels.norm.row_scale import inverse_rms
from pallas_kernels.partials import add_up


def add_rms_norm(residual: Float[Array, "M D"], partials: Float[Array, "S M D"] | None, weight: Float[Array, "D"], *,
                 eps: float, out_dtype: jnp.dtype, reproducible: bool = False
                 ) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """See `api.add_rms_norm`."""
    if partials is not None:
        residual = residual + add_up(partials)
    return residual, narrowed(residual * _inverse_rms(residual, eps, reproducible) * weight, out_dtype)


def _inverse_rms(rows: Float[Array, "M D"], eps: float, reproducible: bool) -> Float[Array, "M 1"]:
    if not reproducible:
        return inverse_rms(jnp.sum(rows * rows, axis=-1, keepdims=True), rows.shape[1], eps)
    # a CPU adds up 16 rows in another order than one, and the mean's product is fused with the addition of eps for some rows
    square_sum = exact.row_sums(exact.rounded(rows * rows))
    square_sum = jnp.where(square_sum < jnp.finfo(rows.dtype).max, square_sum, jnp.nan)  # where `rounded` ends an infinity
    mean_square = exact.rounded(square_sum / rows.shape[1])
    return 1 / exact.rounded(jnp.sqrt(mean_square + eps))  # a reciprocal root may be approximated, these two are exact
