"""Products of per-token 8-bit activations with per-channel 8-bit weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.w8a8 import reference


def quantise_rows(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float[Array, "M"]]:
    """Symmetric 8-bit codes of each row and its scale, its largest magnitude / 127 (Xiao et al., arXiv:2211.10438).

    A row times a positive factor has the same codes and that factor in its scale, up to the factor's own rounding.

    Args:
      x: f16, bf16 or f32 [M, K]; finite.

    Returns:
      Codes int8[M, K], rounded half to even, and scales f32[M]; a row of zeros has codes and scale zero.

    Raises:
      ValueError: x of another shape or dtype.
    """
    if x.ndim != 2 or 0 in x.shape or x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected float16, bfloat16 or float32 [M, K]")
    return reference.quantise_rows(x)


def matmul(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], values: Int8[Array, "N K"], scales: Float[Array, "N"]
           ) -> Float[Array, "M N"]:
    """q @ values^T, exact in int32, times both scales in f32.

    Args:
      q, row_scales: from `quantise_rows`.
      values: int8[N, K], a row for each output.
      scales: f32[N].

    Returns:
      f32[M, N].

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
    """
    if q.ndim != 2 or q.dtype != jnp.int8 or row_scales.shape != q.shape[:1] or row_scales.dtype != jnp.float32:
        raise ValueError(f"q is {q.dtype}{list(q.shape)} with scales {row_scales.dtype}{list(row_scales.shape)}; expected "
                         "int8[M, K] and float32[M]")
    if values.ndim != 2 or values.dtype != jnp.int8 or values.shape[1] != q.shape[1]:
        raise ValueError(f"values are {values.dtype}{list(values.shape)}; expected int8[N, {q.shape[1]}]")
    if scales.shape != values.shape[:1] or scales.dtype != jnp.float32:
        raise ValueError(f"scales are {scales.dtype}{list(scales.shape)}; expected float32[{values.shape[0]}]")
    return reference.product(q, values).astype(jnp.float32) * scales * row_scales[:, None]
