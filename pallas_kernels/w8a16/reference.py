"""The product of half-precision rows with 8-bit weights, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def matmul(x: Float[Array, "M K"], values: Int8[Array, "N K"], scales: Float[Array, "N"]) -> Float[Array, "M N"]:
    """x @ (values * scales)^T in f32."""
    product = jax.lax.dot_general(x, values.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return product * scales
