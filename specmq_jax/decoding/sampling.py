"""How a token is drawn from logits.

The noise is keyed by the position of the drawn token alone, so that speculative and plain decoding with one seed draw the
same tokens, whatever drafted them (Gumbel-max; see design notes in `decode`).
"""

import dataclasses
import operator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.nucleus import least_kept
from specmq_jax.errors import UserError

_HOTTEST = float(np.finfo(np.float32).max)


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
        return best(logits)


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
        if not (_is_number(self.temperature) and 0 < self.temperature <= _HOTTEST):
            raise UserError(f"temperature must be a number above 0 that float32 holds; found {self.temperature!r} (greedy "
                            "decoding is `Greedy()`)")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k must be a whole number of 0 or more; found {self.top_k!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p must lie in (0, 1]; found {self.top_p!r}")

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: Array) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i."""
        return draw(self.filter(scaled(logits, self.temperature)), positions, key)

    def filter(self, scores: Float[Array, "T V"]) -> Float[Array, "T V"]:
        """Sets to -inf what top-k and then top-p cut away, of scores whose best is 0 in each row."""
        if not 0 < self.top_k < scores.shape[1] and np.float32(self.top_p) == 1:
            return scores
        return cut(scores, min(self.top_k, scores.shape[1]), self.top_p, most=self.top_k)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def best(logits: Float[Array, "T V"]) -> Int32[Array, "T"]:
    """The token of the highest score; ties go to the lower id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def scaled(logits: Float[Array, "T V"], temperature: Float[Array, ""] | float) -> Float[Array, "T V"]:
    """log softmax(logits / temperature) but for a number per row, f32: 0 for the best token, at any temperature above 0.

    A temperature that f32 holds as 0 leaves the best tokens alone.
    """
    logits = logits.astype(jnp.float32)
    behind = logits - jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(behind == 0, 0.0, behind / temperature)


def cut(scores: Float[Array, "T V"], top_k: Int32[Array, ""] | int, top_p: Float[Array, ""] | float,
        min_p: Float[Array, ""] | float = 0.0, *, most: int = 0) -> Float[Array, "T V"]:
    """Sets to -inf what the settings cut away, in the order top_k, top_p, min_p, of scores whose best is 0 in each row.

    Stays, with its equals: what is among the `top_k` best; of this the smallest set of best tokens whose probability reaches
    `top_p`; of this what has at least `min_p` times the best token's. `most` is `top_k` where it is a constant, else 0.
    """
    rows = scores.shape[:1]
    least = least_kept(scores, jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), rows),
                       jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), rows), most=most)
    # what is not a number stays, and is drawn: by its logit a fault is known
    return jnp.where(scores < jnp.maximum(least, jnp.log(min_p))[:, None], -jnp.inf, scores)


def draw(scores: Float[Array, "T V"], positions: Int32[Array, "T"], key: Array) -> Int32[Array, "T"]:
    """A token of each row with probability softmax(scores), by noise of the drawn token's position (Gumbel-max)."""
    noise = jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key, p), scores.shape[-1:]))(positions)
    return best(scores + noise)


def seed_key(seed: int) -> Array:
    """The key of the sampling noise of a seed, as of `seed_bits`."""
    return jax.random.key(seed_bits(seed))


def seed_bits(seed: int) -> np.uint32:
    """What counts of a seed, which is any integer: its lowest 32 bits.

    Raises:
      UserError: not an integer.
    """
    try:
        if isinstance(seed, bool):
            raise TypeError
        return np.uint32(operator.index(seed) % 2**32)
    except TypeError:
        raise UserError(f"a seed is an integer; found {seed!r}") from None
