"""How a token is drawn from logits.

The noise is keyed by the position of the drawn token alone, so that speculative and plain decoding with one seed draw the
same tokens, whatever drafted them (Gumbel-max; see design notes in `decode`).
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specmq_jax.errors import UserError


class Sampler(Protocol):
    """How a token is drawn; hashable, for it is a constant of jitted functions."""

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: Any) -> Int32[Array, "T"]:
        """One token a row; `positions[i]` is the position of the token drawn after row i, `key` what `Decoder.prefill` was
        given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The token of the highest logit; ties go to the lower id."""

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: Array) -> Int32[Array, "T"]:
        del positions, key
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draws from softmax(logits / temperature) cut to the `top_k` best and then to the `top_p` nucleus.

    Attributes:
      temperature: above 0.
      top_k: how many of the best tokens stay; 0 keeps all.
      top_p: the smallest set of best tokens whose probability reaches this stays; 1.0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0; found {self.temperature} (greedy decoding is `Greedy()`)")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 or more; found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1]; found {self.top_p}")

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: Array) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i."""
        scores = self.filter(logits.astype(jnp.float32) / self.temperature)
        noise = jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key, p), logits.shape[-1:]))(positions)
        return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)

    def filter(self, scores: Float[Array, "T V"]) -> Float[Array, "T V"]:
        """Sets to -inf what top-k and then top-p cut away."""
        vocab = scores.shape[-1]
        kept = min(self.top_k, vocab) or vocab
        if kept == vocab and self.top_p == 1.0:
            return scores
        best = jax.lax.top_k(scores, kept)[0]
        threshold = best[:, -1:]
        if self.top_p < 1.0:
            probabilities = jax.nn.softmax(best, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            threshold = jnp.min(jnp.where(before < self.top_p, best, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= threshold, scores, -jnp.inf)
