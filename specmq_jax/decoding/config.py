"""Frozen descriptions of decoding."""

import dataclasses
from typing import Self

from specmq_jax import entries
from specmq_jax.decoding.sampling import Greedy, Sampler
from specmq_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to decode.

    Attributes:
      max_len: tokens of prompt and output that the cache holds.
      sampling: how a token is drawn from logits.
      stop_tokens: ids that end the output; the one that came stays in it.
      seed: of the sampling noise.
      prefill_chunks: the chunk lengths a prompt is taken in by; each is compiled once. None suits the device and `max_len`.
      reproducible: the target sums up in one order for any number of rows, so that on a GPU speculative output equals
        plain output bit for bit, for trees of at most 64 nodes and at the cost of some speed. Without it a near tie of
        two tokens may fall the other way. On a CPU it promises no bits, and nowhere for a nucleus (top_p below 1), whose
        probabilities XLA adds up.
    """

    max_len: int = 2048
    sampling: Sampler = Greedy()
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    prefill_chunks: tuple[int, ...] | None = None
    reproducible: bool = False

    def __post_init__(self) -> None:
        entries.integer("DecodeConfig", "max_len", self.max_len, low=2)
        if not callable(self.sampling):
            raise UserError(f"DecodeConfig needs Greedy() or Sampling(...) for 'sampling'; found "
                            f"{entries.shown(self.sampling)}")
        if not entries.is_integer(self.seed):
            raise UserError(f"DecodeConfig needs an integer 'seed'; found {entries.shown(self.seed)}")
        entries.flag("DecodeConfig", "reproducible", self.reproducible)
        object.__setattr__(self, "stop_tokens", entries.integers("DecodeConfig", "stop_tokens", self.stop_tokens))
        if self.prefill_chunks is not None:
            chunks = entries.integers("DecodeConfig", "prefill_chunks", self.prefill_chunks, low=1)
            if not chunks:
                raise UserError("DecodeConfig needs at least one length in 'prefill_chunks'; found none (None suits the "
                                "device)")
            object.__setattr__(self, "prefill_chunks", chunks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Shape of an EAGLE-2 draft tree.

    Attributes:
      depth: levels of drafted tokens (the papers' 6/10/60 is depth/top_k/size).
      top_k: candidates of each row, and rows of each level.
      size: nodes that the target verifies, the root counted.
    """

    depth: int = 6
    top_k: int = 10
    size: int = 60

    def __post_init__(self) -> None:
        for key, value in (("depth", self.depth), ("top_k", self.top_k), ("size", self.size)):
            entries.integer("TreeConfig", key, value, low=-entries.LARGEST)
        if min(self.depth, self.top_k) < 1 or self.size < 2:
            raise UserError(f"a tree needs depth and top_k of at least 1 and a size of at least 2; found {self.depth}, "
                            f"{self.top_k}, {self.size}")
        if self.size - 1 > self.candidates:
            raise UserError(f"a tree of depth {self.depth} and top_k {self.top_k} has {self.candidates} candidates; "
                            f"size {self.size} needs {self.size - 1}")

    @classmethod
    def fitting(cls, depth: int, top_k: int, size: int | None = None) -> Self:
        """A tree of so many levels, with `size` nodes or, where there are no more, all its candidates and the root."""
        most = cls(depth=depth, top_k=top_k, size=2).candidates + 1
        return cls(depth=depth, top_k=top_k, size=most if size is None else min(size, most))

    @property
    def candidates(self) -> int:
        """How many scored nodes growing produces: k at the first level, k * k at each further one."""
        return self.top_k + (self.depth - 1) * self.top_k**2
