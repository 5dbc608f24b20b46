"""The dense product in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(x: Float[Array, "M K"], weights: Float[Array, "A B"], *, transposed: bool) -> Float[Array, "M N"]:
    """The product in f32; see `api.matmul_partials`."""
    return jax.lax.dot_general(x, weights, (((1,), (1 if transposed else 0,)), ((), ())), precision="highest",
                               preferred_element_type=jnp.float32)
