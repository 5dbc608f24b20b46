"""Sampling whose settings are arrays, so that requests with settings of their own share one compiled loop."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from specmq_jax import entries
from specmq_jax.decoding import sampling
from specmq_jax.errors import UserError
from specmq_jax.network import side_by_side

MOST_BIASES, MOST_STOP_TOKENS = 64, 16
"""Tokens of a request with a bias, and stop tokens: each has room for so many."""
_MOST_BIAS, _NO_TOKEN = 1e6, -1


@flax.struct.dataclass
class RequestKey:
    """What `RequestSampling` takes for a key.

    Attributes:
      seed: u32 scalar, of the noise.
      temperature: f32 scalar; 0 is greedy.
      top_p: f32 scalar in (0, 1].
      top_k: i32 scalar, how many of the best tokens stay; 0 keeps all.
      min_p: f32 scalar in [0, 1], the least probability that stays, as a part of the best token's; 0 keeps all.
      biased, biases: i32[K] and f32[K], tokens, -1 for none, and what is added to their logits.
      barred, bar: i32[S] and i32 scalar, tokens, -1 for none, that are not drawn at positions below the bar.
    """

    seed: UInt32[Any, ""]
    temperature: Float[Any, ""]
    top_p: Float[Any, ""]
    top_k: Int32[Any, ""]
    min_p: Float[Any, ""]
    biased: Int32[Any, "K"]
    biases: Float[Any, "K"]
    barred: Int32[Any, "S"]
    bar: Int32[Any, ""]

    @classmethod
    def of(cls, *, seed: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
           logit_bias: Mapping[int, float] | None = None, barred: Sequence[int] = (), bar: int = 0) -> Self:
        """In the host's memory; `seed` as in `sampling.seed_bits`, `logit_bias` by token id, at most 64 of them.

        Raises:
          UserError: a setting outside its range.
        """
        bias = {} if logit_bias is None else logit_bias
        if not isinstance(bias, Mapping):
            raise UserError(f"logit_bias must map token ids to numbers; found {entries.shown(bias)}")
        if len(bias) > MOST_BIASES:
            raise UserError(f"a request has at most {MOST_BIASES} tokens with a bias; found {len(bias)}")
        for token, value in bias.items():
            if not entries.is_integer(token) or token < 0 or isinstance(value, bool) or not isinstance(
                    value, int | float) or not abs(value) <= _MOST_BIAS:
                raise UserError(f"logit_bias must map token ids to numbers of at most {_MOST_BIAS:g} either way; found "
                                f"{token!r}: {value!r}")
        # whose checks these are
        sampling.Sampling(temperature=1.0 if temperature == 0 else temperature, top_k=top_k, top_p=top_p)
        if isinstance(min_p, bool) or not isinstance(min_p, int | float) or not 0 <= min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1]; found {min_p!r}")
        # a device may take a smaller number for the 0 of greedy decoding, in which tokens that tie don't share the draws
        least = float(jnp.finfo(jnp.float32).tiny) if temperature else 0.0
        return cls(seed=sampling.seed_bits(seed), temperature=np.float32(max(temperature, least)), top_p=np.float32(top_p),
                   top_k=np.int32(min(top_k, entries.LARGEST)), min_p=np.float32(min_p),
                   biased=_filled([*bias], MOST_BIASES, _NO_TOKEN, np.int32),
                   biases=_filled([*bias.values()], MOST_BIASES, 0, np.float32),
                   barred=_filled(barred, MOST_STOP_TOKENS, _NO_TOKEN, np.int32), bar=np.int32(bar))


@dataclasses.dataclass(frozen=True)
class RequestSampling:
    """Draws what `specmq_jax.Sampling`, or `Greedy` at a temperature of 0, draws with the same seed."""

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i."""
        asked = jnp.any(key.biased >= 0) | jnp.any(positions < key.bar)
        logits = side_by_side.do_where(asked, _changed, logits.astype(jnp.float32), positions, key)
        return side_by_side.do_where(key.temperature > 0, _draw, sampling.best(logits), logits, positions, key)


def _filled(values: Sequence[float], count: int, rest: float, dtype: type) -> np.ndarray:
    return np.pad(np.asarray(values, dtype), (0, count - len(values)), constant_values=rest)


def _changed(logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey) -> Float[Array, "T V"]:
    """With the request's biases, and without what is barred where the drawn token will stand."""
    none = logits.shape[1]  # beyond the last token, where nothing is written

    def places(tokens: Int32[Array, "K"]) -> Int32[Array, "K"]:
        return jnp.where(tokens < 0, none, tokens)

    logits = logits.at[:, places(key.biased)].add(key.biases, mode="drop")
    without = logits.at[:, places(key.barred)].set(-jnp.inf, mode="drop")
    return jnp.where((positions < key.bar)[:, None], without, logits)


def _draw(best: Int32[Array, "T"], logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey
          ) -> Int32[Array, "T"]:
    del best
    scores = sampling.scaled(logits, key.temperature)
    cuts = (key.top_p < 1) | (key.top_k > 0) | (key.min_p > 0)
    return sampling.draw(side_by_side.do_where(cuts, _cut, scores, key), positions, jax.random.key(key.seed))


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
