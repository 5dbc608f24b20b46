"""The hierarchical framework: a small model, itself decoding with an EAGLE tree, drafts a chain for the target.

Section 4 of arXiv 2505.22179. The trees are verified by the small model, so that the large one only checks a short chain.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from specmq_jax.decoding.drafters.checks import check_flag, check_lengths, check_model, describe_model, is_count
from specmq_jax.decoding.drafters.eagle import EagleDrafter, EagleState
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.decoding.verification import verify
from specmq_jax.errors import UserError
from specmq_jax.loading.model import Model, check_vocabulary
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig


class HierarchicalState(flax.struct.PyTreeNode):
    """The small model's side of the sequence, P being the target's committed length.

    Attributes:
      cache: the small model's; its length is P, or P + 1 when it is ahead.
      inner: the EAGLE drafter's state, as long as `cache`.
      position: i32 scalar, P.
      ahead: bool scalar, the small model has already taken in the root and drafted the token behind it.
      token: i32 scalar, that token.
      drafted: i32 scalar, tokens drafted in the round that awaits `advance`.
      features: [N, F], the small model's features at P, P + 1, ... as the round wrote them.
      accept_lengths: i32[R], tokens each inner round accepted, room for every round there can be; rounds: i32 scalar, how
        many that is.
    """

    cache: KVCache
    inner: EagleState
    position: Int32[Array, ""]
    ahead: Bool[Array, ""]
    token: Int32[Array, ""]
    drafted: Int32[Array, ""]
    features: Float[Array, "N F"]
    accept_lengths: Int32[Array, "R"]
    rounds: Int32[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HierarchicalDrafter:
    """Contains decode rounds of a small model, each with a tree of its own EAGLE head.

    Attributes:
      model: the small model.
      inner: its EAGLE drafter.
      min_draft_length: inner rounds run until this many tokens are drafted (the papers' 6); the last round may add as
        many as the tree is deep, so the chain has up to min_draft_length + depth tokens.
      draft_model_start: the small model drafts the first token of every round, not only after a full acceptance.
    """

    model: Model
    inner: EagleDrafter
    min_draft_length: int = 6
    draft_model_start: bool = False

    def __post_init__(self) -> None:
        check_model(self.model)
        if not isinstance(self.inner, EagleDrafter):
            raise UserError(f"the inner drafter must be a specmq_jax.EagleDrafter; found a {type(self.inner).__name__}")
        if not is_count(self.min_draft_length):
            raise UserError(f"min_draft_length must be at least 1, a whole number; found {self.min_draft_length!r}")
        check_flag("draft_model_start", self.draft_model_start)
        self.inner.check(self.model.config)

    def __repr__(self) -> str:
        return (f"HierarchicalDrafter({describe_model(self.model)}, {self.inner!r}, min_draft_length={self.min_draft_length}, "
                f"draft_model_start={self.draft_model_start})")

    @property
    def params(self) -> Any:
        return {"model": self.model.params, "inner": self.inner.params}

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    @property
    def max_depth(self) -> int:
        return self.min_draft_length + self.inner.max_depth

    @property
    def resumes(self) -> bool:
        return True

    @property
    def tree_size(self) -> int:
        return self.max_depth + 1

    @property
    def scratch_rows(self) -> int:
        return self.tree_size + max(self.inner.tree_size, self.inner.scratch_rows)

    def check(self, target: LlamaConfig, *, max_len: int | None = None) -> None:
        check_vocabulary(self.model.config, target)
        check_lengths(self.model.config, self.max_depth, max_len)

    def init(self, max_len: int, *, limit: int | None = None) -> HierarchicalState:
        width = self.inner.head.config.feature_size
        # A round of the target commits at least one token, and each inner round of it drafts at least one.
        most_rounds = max_len * self.min_draft_length
        return HierarchicalState(
            cache=self.model.new_cache(max_len, limit=limit), inner=self.inner.init(max_len, limit=limit),
            position=jnp.int32(0), ahead=jnp.asarray(False), token=jnp.int32(0), drafted=jnp.int32(0),
            features=jnp.zeros((self.tree_size + 1, width), jnp.float32),
            accept_lengths=jnp.zeros(most_rounds, jnp.int32), rounds=jnp.int32(0))

    def prefill(self, params: Any, state: HierarchicalState, tokens: Int32[Array, "M"], next_tokens: Int32[Array, "M"],
                features: Float[Array, "M F"], count: Int32[Array, ""]) -> HierarchicalState:
        del features
        position = state.cache.length - state.ahead
        _, features, cache = side_by_side.apply(self._module, params["model"], tokens, state.cache.rewind(position))
        inner = self.inner.prefill(params["inner"], self.inner.rewind(state.inner, position), tokens, next_tokens, features,
                                   count)
        cache = cache.advance(count)
        return state.replace(cache=cache, inner=inner, position=cache.length, ahead=jnp.asarray(False))

    def propose(self, params: Any, state: HierarchicalState, root: Int32[Array, ""]
                ) -> tuple[DraftTree, HierarchicalState]:
        tokens = jnp.full(self.tree_size, -1, jnp.int32).at[0].set(root)
        tokens = tokens.at[1].set(jnp.where(state.ahead, state.token, -1))
        state = state.replace(drafted=state.ahead.astype(jnp.int32))

        def unfinished(carry: tuple[Array, HierarchicalState]) -> Array:
            return carry[1].drafted < self.min_draft_length

        def inner_round(carry: tuple[Array, HierarchicalState]) -> tuple[Array, HierarchicalState]:
            tokens, state = carry
            accepted, state = self._inner_round(params, state, tokens[state.drafted])
            assert accepted.features is not None  # of a verification
            tokens = jax.lax.dynamic_update_slice(tokens, accepted.tokens, (state.drafted + 1,))
            features = jax.lax.dynamic_update_slice(state.features, accepted.features.astype(jnp.float32),
                                                    (state.drafted, jnp.int32(0)))
            return tokens, state.replace(drafted=state.drafted + accepted.count, features=features)

        tokens, state = side_by_side.repeat_until_done(unfinished, inner_round, (tokens, state))
        tokens = jnp.where(jnp.arange(self.tree_size) <= state.drafted, tokens, -1)
        return DraftTree.chain(tokens), state

    def advance(self, params: Any, state: HierarchicalState, accepted: Accepted) -> HierarchicalState:
        """Rewinds both inner levels to what the target kept; after a full acceptance, or always with
        `draft_model_start`, the small model goes one token ahead: it has to take in the last draft anyway."""
        length = state.position + accepted.count
        ahead = (accepted.count > state.drafted) | self.draft_model_start
        token, features, cache = side_by_side.do_where(
            ahead, lambda *parts: self._go_ahead(params["model"], *parts), (jnp.int32(0), state.features, state.cache),
            state.position + accepted.count - ahead, accepted)
        tokens = jnp.append(accepted.tokens, 0).at[accepted.count].set(token)
        taken = accepted.count + ahead
        inner = self.inner.advance(
            params["inner"], self.inner.rewind(state.inner, state.position),
            Accepted(path=jnp.arange(tokens.shape[0], dtype=jnp.int32), nodes=jnp.append(accepted.nodes, 0),
                     tokens=tokens, count=taken, features=features))
        return state.replace(
            cache=cache.rewind(length + ahead), inner=inner, position=length, ahead=ahead, token=token,
            features=features.at[0].set(features[accepted.count]))

    def accept_lengths(self, state: HierarchicalState) -> Int32[np.ndarray, "n"]:
        return np.asarray(state.accept_lengths)[:int(state.rounds)]

    @property
    def _module(self) -> Any:
        return self.model.module.clone(capture=self.inner.capture)

    def _inner_round(self, params: Any, state: HierarchicalState, root: Int32[Array, ""]
                     ) -> tuple[Accepted, HierarchicalState]:
        tree, inner = self.inner.propose(params["inner"], state.inner, root)
        accepted, cache = verify(self._module, params["model"], state.cache, tree,
                                 lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
        inner = self.inner.advance(params["inner"], inner, accepted)
        return accepted, state.replace(
            cache=cache, inner=inner, rounds=state.rounds + 1,
            accept_lengths=state.accept_lengths.at[state.rounds].set(accepted.count))

    def _go_ahead(self, params: Any, parts: tuple[Array, Float[Array, "N F"], KVCache], before: Int32[Array, ""],
                  accepted: Accepted) -> tuple[Int32[Array, ""], Float[Array, "N F"], KVCache]:
        """The small model on the two newest committed tokens: the token behind them, their features, the cache.

        Args:
          params: the small model's.
          parts: what of the state it changes, the token first.
          before: row of the cache that the first of the two goes to.
          accepted: of the target.
        """
        _, all_features, cache = parts
        newest = jnp.stack([accepted.nodes[accepted.count - 1], accepted.tokens[accepted.count - 1]])
        hidden, features, cache = side_by_side.apply(self._module, params, newest, cache.rewind(before))
        logits = side_by_side.apply(self._module, params, hidden[-1:], method="logits")
        features = jax.lax.dynamic_update_slice(all_features, features.astype(jnp.float32),
                                                (accepted.count - 1, jnp.int32(0)))
        return jnp.argmax(logits[0]).astype(jnp.int32), features, cache
