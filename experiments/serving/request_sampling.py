"""Sampling whose temperature and nucleus are arrays, so that requests with settings of their own share one compiled loop."""

import dataclasses
import functools
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specmq_jax.decoding import sampling


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
        """On the default device; `seed` as in `sampling.seed_key`."""
        # a device may take a smaller number for the 0 of greedy decoding, in which tokens that tie don't share the draws
        least = float(jnp.finfo(jnp.float32).tiny) if temperature else 0.0
        return cls(key=sampling.seed_key(seed), temperature=jnp.float32(max(temperature, least)), top_p=jnp.float32(top_p))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestSampling:
    """Draws what `specmq_jax.Sampling`, or `Greedy` at a temperature of 0, draws with the same seed.

    Attributes:
      top_k: how many of the best tokens stay; 0 keeps all.
    """

    top_k: int = 0

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i."""
        return jax.lax.cond(key.temperature > 0, self._draw, lambda logits, *_: sampling.best(logits), logits, positions, key)

    def _draw(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
        scores = sampling.keep_best(sampling.scaled(logits, key.temperature), self.top_k)
        nucleus = functools.partial(sampling.keep_nucleus, most=self.top_k)
        scores = jax.lax.cond(key.top_p < 1, nucleus, lambda scores, _: scores, scores, key.top_p)
        return sampling.draw(scores, positions, key.key)
