"""A small model, or the target's own weights at a lower precision, drafts a chain of tokens greedily."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from specmq_jax.decoding.drafters.checks import check_lengths, check_model, describe_model, is_count
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.errors import UserError
from specmq_jax.loading.model import Model, check_vocabulary
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig


class ChainState(flax.struct.PyTreeNode):
    """The draft model's side of the sequence.

    Attributes:
      cache: the draft model's, as long as the target's.
      previous: i32 scalar, the committed token before the root. The first draft step takes in both: when every draft of
        the last round was accepted, the cache has no row for `previous` yet; else the row is written again.
      behind: bool scalar, it has none.
    """

    cache: KVCache
    previous: Int32[Array, ""]
    behind: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChainDrafter:
    """Drafts `length` tokens a round (`length` + 1 nodes with the root).

    Attributes:
      model: the draft model; it must share the target's vocabulary.
      length: drafted tokens, at least 1.
    """

    model: Model
    length: int = 4

    def __post_init__(self) -> None:
        check_model(self.model)
        if not is_count(self.length):
            raise UserError(f"a chain drafter drafts at least 1 token a round; length must be a whole number, found "
                            f"{self.length!r}")

    def __repr__(self) -> str:
        return f"ChainDrafter({describe_model(self.model)}, length={self.length})"

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    @property
    def params(self) -> Any:
        return self.model.params

    @property
    def resumes(self) -> bool:
        return True

    @property
    def tree_size(self) -> int:
        return self.length + 1

    @property
    def scratch_rows(self) -> int:
        return self.length

    @property
    def max_depth(self) -> int:
        return self.length

    def check(self, target: LlamaConfig, *, max_len: int | None = None) -> None:
        check_vocabulary(self.model.config, target)
        check_lengths(self.model.config, self.max_depth, max_len)

    def init(self, max_len: int, *, limit: int | None = None) -> ChainState:
        return ChainState(cache=self.model.new_cache(max_len, limit=limit), previous=jnp.int32(0),
                          behind=jnp.asarray(False))

    def prefill(self, params: Any, state: ChainState, tokens: Int32[Array, "M"], next_tokens: Int32[Array, "M"],
                features: Float[Array, "M F"], count: Int32[Array, ""]) -> ChainState:
        del next_tokens, features
        start, last, room = state.cache.length, tokens[count - 1], count < tokens.shape[0]
        tokens = jnp.where(state.behind, jnp.roll(tokens, 1).at[0].set(state.previous), tokens)
        _, _, cache = side_by_side.apply(self.model.module, params, tokens, state.cache.rewind(start - state.behind))
        return ChainState(cache=cache.rewind(start + count), previous=last, behind=state.behind & ~room)

    def propose(self, params: Any, state: ChainState, root: Int32[Array, ""]) -> tuple[DraftTree, ChainState]:
        start = state.cache.length
        first, cache = self._step(params, state.cache.rewind(start - 1), jnp.stack([state.previous, root]))

        def draft(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            tokens, cache = carry
            token, cache = self._step(params, cache.rewind(start + i), tokens[i][None])
            return tokens.at[i + 1].set(token), cache

        tokens = jnp.zeros(self.tree_size, jnp.int32).at[0].set(root).at[1].set(first)
        tokens, cache = jax.lax.fori_loop(1, self.length, draft, (tokens, cache))
        return DraftTree.chain(tokens), state.replace(cache=cache.rewind(start))

    def advance(self, params: Any, state: ChainState, accepted: Accepted) -> ChainState:
        del params
        return ChainState(cache=state.cache.advance(accepted.count), previous=accepted.nodes[accepted.count - 1],
                          behind=accepted.count > self.length)

    def accept_lengths(self, state: ChainState) -> Int32[np.ndarray, "n"]:
        del state
        return np.zeros(0, np.int32)

    def _step(self, params: Any, cache: KVCache, tokens: Int32[Array, "M"]) -> tuple[Int32[Array, ""], KVCache]:
        """The greedy token behind `tokens`, which stand behind the cache's committed rows."""
        hidden, _, cache = side_by_side.apply(self.model.module, params, tokens, cache)
        logits = side_by_side.apply(self.model.module, params, hidden[-1:], method="logits")
        return jnp.argmax(logits[0]).astype(jnp.int32), cache
