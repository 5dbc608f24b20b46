"""Sampling whose settings are arrays, so that requests with settings of their own share one compiled loop."""

import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specmq_jax.decoding import sampling
from specmq_jax.errors import UserError
from specmq_jax.network import side_by_side


@flax.struct.dataclass
class RequestKey:
    """What `RequestSampling` takes for a key.

    Attributes:
      key: of the noise.
      temperature: f32 scalar; 0 is greedy.
      top_p: f32 scalar in (0, 1].
      top_k: i32 scalar, how many of the best tokens stay; 0 keeps all.
      min_p: f32 scalar in [0, 1], the least probability that stays, as a part of the best token's; 0 keeps all.
    """

    key: Array
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int32[Array, ""]
    min_p: Float[Array, ""]

    @classmethod
    def of(cls, *, seed: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Self:
        """On the default device; `seed` as in `sampling.seed_key`.

        Raises:
          UserError: a setting outside its range.
        """
        sampling.Sampling(temperature=temperature or 1.0, top_k=top_k, top_p=top_p)  # whose checks these are
        if isinstance(min_p, bool) or not isinstance(min_p, int | float) or not 0 <= min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1]; found {min_p!r}")
        # a device may take a smaller number for the 0 of greedy decoding, in which tokens that tie don't share the draws
        least = float(jnp.finfo(jnp.float32).tiny) if temperature else 0.0
        return cls(key=sampling.seed_key(seed), temperature=jnp.float32(max(temperature, least)), top_p=jnp.float32(top_p),
                   top_k=jnp.int32(top_k), min_p=jnp.float32(min_p))


@dataclasses.dataclass(frozen=True)
class RequestSampling:
    """Draws what `specmq_jax.Sampling`, or `Greedy` at a temperature of 0, draws with the same seed."""

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i."""
        return side_by_side.do_where(key.temperature > 0, _draw, sampling.best(logits), logits, positions, key)


def _draw(best: Int32[Array, "T"], logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey
          ) -> Int32[Array, "T"]:
    del best
    scores = sampling.scaled(logits, key.temperature)
    cuts = (key.top_p < 1) | (key.top_k > 0) | (key.min_p > 0)
    return sampling.draw(side_by_side.do_where(cuts, _cut, scores, key), positions, key.key)


def _cut(scores: Float[Array, "T V"], key: RequestKey) -> Float[Array, "T V"]:
    """Sets to -inf what the settings cut away, in the order top_k, top_p, min_p."""
    place = jnp.arange(scores.shape[-1])
    most = jnp.where(key.top_k > 0, jnp.minimum(key.top_k, len(place)), len(place))
    best = jnp.where(place < most, -jnp.sort(-scores, axis=-1), -jnp.inf)
    probabilities = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (place < most) & ((before < key.top_p) | (key.top_p >= 1) | (place == 0))
    least = jnp.min(jnp.where(inside, best, jnp.inf), axis=-1, keepdims=True)
    least = jnp.maximum(least, jnp.where(key.min_p > 0, jnp.log(key.min_p), -jnp.inf))  # the best token's score is 0
    return jnp.where(scores >= least, scores, -jnp.inf)
