"""What decoding asks of a drafter: four pure verbs and two static sizes."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float, Int32

from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.network.config import LlamaConfig

State = Any
Params = Any


class Drafter(Protocol):
    """Proposes a tree of tokens a round. Arrays travel in `params` and `state`; the object itself holds none of them
    inside a jitted function."""

    @property
    def params(self) -> Params:
        """The drafter's weights, an argument of every verb."""

    @property
    def capture(self) -> tuple[int, ...]:
        """Target layers whose entering residual streams are the features it reads; empty for the final states."""

    @property
    def tree_size(self) -> int:
        """Nodes of the proposed tree, the root counted."""

    @property
    def scratch_rows(self) -> int:
        """Cache rows behind the committed ones that `propose` may write."""

    @property
    def resumes(self) -> bool:
        """Whether an empty state, but for caches that keep their first n rows, is one that has taken in n tokens.

        An engine takes a drafter that doesn't say for one whose isn't."""

    @property
    def max_depth(self) -> int:
        """Deepest level of drafted tokens."""

    def check(self, target: LlamaConfig, *, max_len: int | None = None) -> None:
        """Raises a `UserError` where the drafter can't draft for that target or, if it is given, for `max_len` tokens."""

    def init(self, max_len: int, *, limit: int | None = None) -> State:
        """An empty state of `max_len` cache rows for sequences of at most `limit` tokens (default: as many)."""

    def prefill(self, params: Params, state: State, tokens: Int32[Array, "M"], next_tokens: Int32[Array, "M"],
                features: Float[Array, "M F"], count: Int32[Array, ""]) -> State:
        """Takes in `count` more tokens, of the prompt or committed without a draft (the rest of M is padding).

        Args:
          params, state: as above.
          tokens: ids; next_tokens: the id behind each (after the last: the newest token the target drew).
          features: what the target's forward pass gave for those rows: final-norm states, or captured streams.
          count: how many rows are real.
        """

    def propose(self, params: Params, state: State, root: Int32[Array, ""]) -> tuple[DraftTree, State]:
        """A tree whose node 0 is `root`, the newest committed token."""

    def advance(self, params: Params, state: State, accepted: Accepted) -> State:
        """Commits what the target accepted."""

    def accept_lengths(self, state: State) -> Int32[np.ndarray, "n"]:
        """What each decode round inside the drafter accepted, read on the host; empty where there are none."""
