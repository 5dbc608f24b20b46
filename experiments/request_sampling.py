"""Sampling whose temperature and nucleus are arrays, so that requests with settings of their own share one compiled loop."""

import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@flax.struct.dataclass
class RequestKey:
    """What `RequestSampling` takes for a key.

    Attributes:
      key: of the noise.
      temperature: f32 scalar; 0 is greedy.
      top_p: f32 scalar in (0, 1].
    """

    key: Array
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]

    @classmethod
    def of(cls, *, seed: int, temperature: float, top_p: float) -> Self:
        """On the default device; `seed` is any integer, of which the lowest 32 bits count."""
        return cls(key=jax.random.key(seed % 2**32), temperature=jnp.float32(temperature), top_p=jnp.float32(top_p))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestSampling:
    """Draws what `specmq_jax.Sampling`, or `Greedy` at a temperature of 0, draws with the same seed.

    Attributes:
      top_k: how many of the best tokens stay; 0 keeps all.
    """

    top_k: int = 0

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i."""
        return jax.lax.cond(key.temperature > 0, self._draw, _best, logits, positions, key)

    def _draw(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
        scores = logits.astype(jnp.float32) / key.temperature
        if self.top_k:
            threshold = jax.lax.top_k(scores, min(self.top_k, scores.shape[-1]))[0][:, -1:]
            scores = jnp.where(scores >= threshold, scores, -jnp.inf)
        scores = jax.lax.cond(key.top_p < 1, _nucleus, lambda scores, _: scores, scores, key.top_p)
        noise = jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key.key, p), logits.shape[-1:]))(positions)
        return _best(scores + noise, positions, key)


def _best(logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
    del positions, key
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _nucleus(scores: Float[Array, "T V"], top_p: Float[Array, ""]) -> Float[Array, "T V"]:
    best = -jnp.sort(-scores, axis=-1)
    probabilities = jax.nn.softmax(best, axis=-1)
    inside = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    return jnp.where(scores >= jnp.min(best, axis=-1, keepdims=True, where=inside, initial=jnp.inf), scores, -jnp.inf)
