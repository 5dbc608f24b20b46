"""Sampling whose settings are arrays, so that requests with settings of their own share one compiled loop."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from specmq_jax import entries
from specmq_jax.decoding import sampling
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.errors import UserError

MOST_BIASES, MOST_STOP_TOKENS = 64, 16
"""Tokens of a request with a bias, and stop tokens: each has room for so many."""
_MOST_BIAS, _MOST_PENALTY, _MOST_REPETITION, _NO_TOKEN = 1e6, 2.0, 1e3, -1


class Past(flax.struct.PyTreeNode):
    """What stands before the tokens that are drawn: committed ones, and of each row the drafted ones on its path.

    Attributes:
      tokens: i32[C], the committed ones and anything behind them.
      length: i32 scalar, how many are committed.
      nodes: i32[T], drafted tokens, -1 for padding; paths: bool[T, T], whether node j stands before what row i draws, and is
        not committed.
    """

    tokens: Int32[Array, "C"]
    length: Int32[Array, ""]
    nodes: Int32[Array, "T"]
    paths: Bool[Array, "T T"]

    @classmethod
    def committed(cls, tokens: Int32[Array, "C"], length: Int32[Array, ""] | int, rows: int = 1) -> Self:
        """Of rows without a draft."""
        return cls(tokens=tokens, length=jnp.asarray(length, jnp.int32), nodes=jnp.full(rows, _NO_TOKEN, jnp.int32),
                   paths=jnp.zeros((rows, rows), bool))

    @classmethod
    def behind(cls, tokens: Int32[Array, "C"], length: Int32[Array, ""], tree: DraftTree) -> Self:
        """Of each node of a draft, whose root is committed."""
        return cls(tokens=tokens, length=length, nodes=tree.tokens, paths=tree.mask.at[:, 0].set(False))


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
      presence, frequency: f32 scalars, taken off the logit of a token that is among the new ones, and as often as it is.
      repetition: f32 scalar above 0, by which the logit of a token of prompt or answer is divided, or multiplied below 0.
      start: i32 scalar, tokens of the prompt.
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
    presence: Float[Any, ""]
    frequency: Float[Any, ""]
    repetition: Float[Any, ""]
    start: Int32[Any, ""]

    @classmethod
    def of(cls, *, seed: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
           logit_bias: Mapping[int, float] | None = None, barred: Sequence[int] = (), bar: int = 0,
           presence_penalty: float = 0.0, frequency_penalty: float = 0.0, repetition_penalty: float = 1.0, start: int = 0
           ) -> Self:
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
        for name, value, low, high in (("min_p", min_p, 0, 1),
                                       ("presence_penalty", presence_penalty, -_MOST_PENALTY, _MOST_PENALTY),
                                       ("frequency_penalty", frequency_penalty, -_MOST_PENALTY, _MOST_PENALTY),
                                       ("repetition_penalty", repetition_penalty, 1 / _MOST_REPETITION, _MOST_REPETITION)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{name} must lie in [{low:g}, {high:g}]; found {value!r}")
        # a device may take a smaller number for the 0 of greedy decoding, in which tokens that tie don't share the draws
        least = float(jnp.finfo(jnp.float32).tiny) if temperature else 0.0
        return cls(seed=sampling.seed_bits(seed), temperature=np.float32(max(temperature, least)), top_p=np.float32(top_p),
                   top_k=np.int32(min(top_k, entries.LARGEST)), min_p=np.float32(min_p),
                   biased=_filled([*bias], MOST_BIASES, _NO_TOKEN, np.int32),
                   biases=_filled([*bias.values()], MOST_BIASES, 0, np.float32),
                   barred=_filled(barred, MOST_STOP_TOKENS, _NO_TOKEN, np.int32), bar=np.int32(bar),
                   presence=np.float32(presence_penalty), frequency=np.float32(frequency_penalty),
                   repetition=np.float32(repetition_penalty), start=np.int32(start))


@dataclasses.dataclass(frozen=True)
class RequestSampling:
    """Draws what `specmq_jax.Sampling`, or `Greedy` at a temperature of 0, draws with the same seed.

    Everything is done whether a key asks for it or not: to ask is a choice that a GPU waits for the host with.

    Attributes:
      penalises: whether penalties are applied; without it they count for nothing.
    """

    penalises: bool = True

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: RequestKey, past: Past | None = None
                 ) -> Int32[Array, "T"]:
        """One token a row, i32[T]; `positions[i]` is the position of the token drawn after row i. Without a `past` nothing has
        been said that a penalty could be for."""
        none, barred = jnp.zeros(logits.shape[1]), _places(key.barred, logits.shape[1])
        logits = logits.astype(jnp.float32) + none.at[_places(key.biased, logits.shape[1])].add(key.biases, mode="drop")
        if self.penalises and past is not None:
            logits = _penalised(logits, key, past)
        is_barred = (none.at[barred].set(1, mode="drop") > 0) & (positions < key.bar)[:, None]
        logits = jnp.where(is_barred, -jnp.inf, logits)
        samples = key.temperature > 0
        scores = sampling.scaled(logits, jnp.where(samples, key.temperature, 1))
        scores = sampling.cut(scores, jnp.where(samples, key.top_k, 0), jnp.where(samples, key.top_p, 1), key.min_p)
        drawn = sampling.draw(scores, positions, jax.random.key(key.seed))
        return jnp.where(samples, drawn, sampling.best(logits))


class Needs(enum.IntEnum):
    """What requests need of sampling, each all that those before it need: the best tokens, what `RequestSampling` does
    without penalties, and with them."""

    BEST = 0
    DRAWS = 1
    PENALTIES = 2

    @property
    def sampler(self) -> sampling.Sampler:
        """The one that does no more."""
        return sampling.Greedy() if self == Needs.BEST else RequestSampling(penalises=self == Needs.PENALTIES)


def _filled(values: Sequence[float], count: int, rest: float, dtype: type) -> np.ndarray:
    return np.pad(np.asarray(values, dtype), (0, count - len(values)), constant_values=rest)


def _places(tokens: Int32[Array, "K"], beyond: int) -> Int32[Array, "K"]:
    """Where tokens stand; for none of them beyond the last, where nothing is written."""
    return jnp.where(tokens < 0, beyond, tokens)


def _penalised(logits: Float[Array, "T V"], key: RequestKey, past: Past) -> Float[Array, "T V"]:
    """Repetition as in Hugging Face's processor of that name (Keskar et al., arXiv:1909.05858), behind it OpenAI's two."""
    none, place = logits.shape[1], jnp.arange(len(past.tokens))
    is_committed = place < past.length
    counts = jnp.zeros(none, jnp.float32).at[past.tokens].add(is_committed & (place >= key.start), mode="drop")
    seen = jnp.zeros(none, bool).at[jnp.where(is_committed, past.tokens, none)].set(True, mode="drop")
    nodes = jnp.where(past.paths & (past.nodes >= 0)[None, :], past.nodes[None, :], none)
    row = jnp.arange(len(logits))[:, None]
    counts = jnp.broadcast_to(counts, logits.shape).at[row, nodes].add(1, mode="drop")
    seen = seen[None, :] | (counts > 0)
    logits = jnp.where(seen, jnp.where(logits > 0, logits / key.repetition, logits * key.repetition), logits)
    return logits - key.frequency * counts - key.presence * (counts > 0)
