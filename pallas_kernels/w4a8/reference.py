"""Products of per-token 8-bit activations with 4-bit weights, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, Shaped, UInt8

from pallas_kernels.w4a8.layout import BLOCK, unpack, unpack_groups
from pallas_kernels.w8a8 import reference as w8a8


def channel_product(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], sums: Int32[Array, "P M"] | None,
                    integers: Int8[Array, "N K"], scales: Float[Array, "N"], offsets: Float[Array, "N"] | None
                    ) -> Float[Array, "M N"]:
    """See `api.channel_partials`; `integers` as from `channel_integers`."""
    product = w8a8.product(q, integers).astype(jnp.float32) * scales * row_scales[:, None]
    if offsets is None:
        return product
    return product - (sums.sum(0).astype(jnp.float32) * row_scales)[:, None] * offsets


def channel_integers(packed: UInt8[Array, "B N 64"], rows: int, *, with_zeros: bool) -> Int8[Array, "N K"]:
    """Codes where there are zero points, else codes less 8."""
    codes = unpack(packed, rows).astype(jnp.int8)
    return codes if with_zeros else codes - 8


def group_product(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], integers: Int8[Array, "N K"],
                  channel_scales: Float[Array, "N"]) -> Float[Array, "M N"]:
    """See `api.group_partials`; `integers` as from `group_integers`."""
    return w8a8.product(q, integers).astype(jnp.float32) * channel_scales * row_scales[:, None]


def group_integers(packed: UInt8[Array, "B N 64"], rows: int, groups: Int32[Array, "G N"], *, with_zeros: bool
                   ) -> Int8[Array, "N K"]:
    """`expand`'s integers of packed codes."""
    return expand(unpack(packed, rows), *unpack_groups(groups, with_zeros=with_zeros))


def saturates(q: UInt8[Array, "N K"], scales: Float[Array, "G N"]) -> Int32[Array, "1"]:
    """Whether any of `expand`'s integers, for f16 scales, had to be held to 8 bits."""
    integers = jnp.round((q.astype(jnp.float32) - 8) * _per_column(scales, q.shape[1]))
    return jnp.any((integers < -128) | (integers > 127)).astype(jnp.int32)[None]


def expand(q: UInt8[Array, "N K"], scales: Shaped[Array, "G N"], zeros: Shaped[Array, "G N"] | None
           ) -> Int8[Array, "N K"]:
    """The 8-bit integers of codes in groups of 128.

    Args:
      q: uint8[N, K], 0..15.
      scales: [ceil(K / 128), N]: f16 for (q - 8) * scale, rounded half to even and held to [-128, 127] (QQQ,
        arXiv:2406.09904), or uint8 for q * scale + zero (QoQ, arXiv:2405.04532), which must lie there.
      zeros: int16 of scales' shape beside uint8 scales, else None.

    Returns:
      int8[N, K].
    """
    codes, scale = q.astype(jnp.float32), _per_column(scales, q.shape[1])
    values = jnp.round((codes - 8) * scale) if zeros is None else codes * scale + _per_column(zeros, q.shape[1])
    return jnp.clip(values, -128, 127).astype(jnp.int8)


def _per_column(groups: Shaped[Array, "G N"], rows: int) -> Float[Array, "N K"]:
    return jnp.repeat(groups.astype(jnp.float32), BLOCK, axis=0)[:rows].T
