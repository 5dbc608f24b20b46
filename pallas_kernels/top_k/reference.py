"""The best of a log-softmax in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def log_softmax_top_k(logits: Float[Array, "M V"], k: int) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
    """See `api.log_softmax_top_k`."""
    scores, indices = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), k)
    return scores, indices.astype(jnp.int32)
