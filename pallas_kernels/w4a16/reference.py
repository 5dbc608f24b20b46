"""The W4A16 product in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.w4a16 import layout


def dequantise(packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], rows: int, group_size: int
               ) -> Float[Array, "K N"]:
    """f32 weights (q - 8) * scale; the last group may be short."""
    values = layout.unpack(packed, rows).astype(jnp.float32) - layout.ZERO
    if group_size == -1:
        return values * scales
    scale = jnp.repeat(layout.unpack_scales(scales, -(-rows // group_size)), group_size, axis=0)
    return values * scale[:rows]


def matmul(x: Float[Array, "M K"], packed: Int32[Array, "B N 16"], scales: Shaped[Array, "H N"], *, group_size: int
           ) -> Float[Array, "M N"]:
    """The product in f32; see `api.matmul`."""
    weights = dequantise(packed, scales, x.shape[1], group_size)
    return jnp.dot(x.astype(jnp.float32), weights, precision="highest")
