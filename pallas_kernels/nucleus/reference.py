"""Where top-k and top-p cut a row of scores, by sorting it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def least_kept(scores: Float[Array, "M V"], top_k: Int32[Array, "M"], top_p: Float[Array, "M"], *, most: int = 0
               ) -> Float[Array, "M"]:
    """See `api.least_kept`. Nothing is sorted where no row cuts."""
    columns = scores.shape[1]
    cuts = ((top_k > 0) & (top_k < columns)) | (top_p < 1)

    def found() -> Float[Array, "M"]:
        best = jax.lax.top_k(scores, most)[0] if 0 < most < columns else -jnp.sort(-scores, axis=-1)
        place = jnp.arange(best.shape[1])
        stays = place < jnp.where(top_k > 0, top_k, columns)[:, None]
        best = jnp.where(stays, best, -jnp.inf)
        probabilities = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        inside = stays & ((before < top_p[:, None]) | (top_p >= 1)[:, None] | (place == 0))
        return jnp.where(cuts, jnp.min(jnp.where(inside, best, jnp.inf), axis=-1), -jnp.inf)

    return jax.lax.cond(cuts.any(), found, lambda: jnp.full(len(scores), -jnp.inf))
