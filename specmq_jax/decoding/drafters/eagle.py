"""EAGLE-2's dynamic tree: grown level by level from a head's most likely paths, then cut to the best nodes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.top_k import api as top_k_kernels
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.decoding.drafters.checks import check_depth
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.errors import UserError
from specmq_jax.loading.head import Head
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig


class EagleState(flax.struct.PyTreeNode):
    """The head's side of the sequence.

    Attributes:
      cache: the head's; row t pairs token t + 1 with the target's state at t.
      feature: f32[D], the head's output at the last committed row, from which the first level is drafted.
    """

    cache: KVCache
    feature: Float[Array, "D"]


class Candidates(flax.struct.PyTreeNode):
    """Scored nodes in order of drafting (the "history").

    Attributes:
      scores: f32[C], sum of log-probabilities from the root.
      tokens: i32[C], ids in the target's vocabulary.
      parents: i32[C], index of each one's parent among the candidates, -1 for the root.
    """

    scores: Float[Array, "C"]
    tokens: Int32[Array, "C"]
    parents: Int32[Array, "C"]

    @classmethod
    def join(cls, levels: Sequence["Candidates"]) -> "Candidates":
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *levels)

    def prune(self, root: Int32[Array, ""], tree: TreeConfig) -> DraftTree:
        """The `tree.size` - 1 best candidates behind the root, in order of drafting.

        Scores never rise along a path and ties go to the lower index, so a chosen node's parent is chosen too.
        """
        chosen = top_k_kernels.ranks(self.scores) < tree.size - 1
        # Counts over pairs, which a GPU runs in one launch each: a sort, a cumulative sum or a scatter takes several.
        index, node = jnp.arange(tree.candidates), jnp.arange(tree.size)
        place = jnp.sum(chosen & (index <= index[:, None]), axis=1, dtype=jnp.int32)
        candidate = jnp.sum(place < node[:, None], axis=1, dtype=jnp.int32)
        above = self.parents[candidate]
        return DraftTree.from_parents(jnp.where(node == 0, root, self.tokens[candidate]),
                                      jnp.where(above < 0, 0, place[above]), max_depth=tree.depth)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EagleDrafter:
    """Grows a tree with an EAGLE head.

    Attributes:
      head: loaded for the target.
      tree: its shape.
    """

    head: Head
    tree: TreeConfig = TreeConfig()

    def __post_init__(self) -> None:
        layer = getattr(getattr(self.head, "config", None), "layer", None)
        if not isinstance(layer, LlamaConfig):
            raise UserError(f"the head must be what specmq_jax.load_head returns; found a {type(self.head).__name__}")
        if not isinstance(self.tree, TreeConfig):
            raise UserError(f"the tree must be a specmq_jax.TreeConfig; found a {type(self.tree).__name__}")
        if self.tree.top_k > layer.vocab_size:
            raise UserError(f"top_k {self.tree.top_k} exceeds the head's vocabulary of {layer.vocab_size}; choose at most as "
                            "many")

    def __repr__(self) -> str:
        tree = self.tree
        return f"EagleDrafter({self.head!r}, depth={tree.depth}, top_k={tree.top_k}, size={tree.size})"

    @property
    def params(self) -> Any:
        return self.head.params

    @property
    def capture(self) -> tuple[int, ...]:
        return self.head.capture

    @property
    def resumes(self) -> bool:
        return True

    @property
    def tree_size(self) -> int:
        return self.tree.size

    @property
    def scratch_rows(self) -> int:
        return (self.tree.depth - 1) * self.tree.top_k

    @property
    def max_depth(self) -> int:
        return self.tree.depth

    def check(self, target: LlamaConfig, *, max_len: int | None = None) -> None:
        self.head.check(target)
        check_depth(self.max_depth, max_len)

    def init(self, max_len: int, *, limit: int | None = None) -> EagleState:
        return EagleState(cache=self.head.new_cache(max_len, limit=limit),
                          feature=jnp.zeros(self.head.config.layer.hidden_size, jnp.float32))

    def prefill(self, params: Any, state: EagleState, tokens: Int32[Array, "M"], next_tokens: Int32[Array, "M"],
                features: Float[Array, "M F"], count: Int32[Array, ""]) -> EagleState:
        del tokens
        return self._commit(params, state, next_tokens, features, count)

    def propose(self, params: Any, state: EagleState, root: Int32[Array, ""]) -> tuple[DraftTree, EagleState]:
        k = self.tree.top_k
        scores, tokens = self._best(params, state.feature[None])
        frontier, tokens, index = scores[0], tokens[0], jnp.arange(k, dtype=jnp.int32)
        levels = [Candidates(scores=frontier, tokens=tokens, parents=jnp.full(k, -1, jnp.int32))]
        features = jnp.broadcast_to(state.feature, (k, state.feature.shape[0]))
        seen, cache = jnp.eye(k, dtype=bool), state.cache
        for level in range(1, self.tree.depth):
            features, cache = self._expand(params, cache, tokens, features, seen, level)
            scores, best = self._best(params, features)
            scores, best = (scores + frontier[:, None]).reshape(-1), best.reshape(-1)
            levels.append(Candidates(scores=scores, tokens=best, parents=jnp.repeat(index, k)))
            frontier, chosen = top_k_kernels.top_k_small(scores, k)
            row, first = chosen // k, k + (level - 1) * k * k
            tokens, features, index = best[chosen], features[row], first + chosen
            seen = jnp.concatenate([seen[row], jnp.eye(k, dtype=bool)], axis=1)
        return Candidates.join(levels).prune(root, self.tree), state.replace(cache=cache)

    def advance(self, params: Any, state: EagleState, accepted: Accepted) -> EagleState:
        assert accepted.features is not None  # of a verification
        return self._commit(params, state, accepted.tokens, accepted.features, accepted.count)

    def accept_lengths(self, state: EagleState) -> Int32[np.ndarray, "n"]:
        del state
        return np.zeros(0, np.int32)

    def rewind(self, state: EagleState, length: Int32[Array, ""]) -> EagleState:
        """Forgets the rows from `length` on; `advance` with the tokens from there must follow, which sets the feature."""
        return state.replace(cache=state.cache.rewind(length))

    def _commit(self, params: Any, state: EagleState, tokens: Int32[Array, "M"], states: Float[Array, "M F"],
                count: Int32[Array, ""]) -> EagleState:
        """Runs the rows of `count` committed tokens with the target's states; the rest of M is padding."""
        features, cache = side_by_side.apply(self.head.module, params["head"], tokens, states, state.cache, None, None,
                                             own=False)
        return EagleState(cache=cache.advance(count), feature=features[count - 1])

    def _expand(self, params: Any, cache: KVCache, tokens: Int32[Array, "K"], features: Float[Array, "K D"],
                seen: Bool[Array, "K C"], level: int) -> tuple[Float[Array, "K D"], KVCache]:
        """One level: k rows at one position, each seeing its ancestors' rows and itself behind the committed ones."""
        offsets = jnp.full(self.tree.top_k, level - 1, jnp.int32)
        return side_by_side.apply(self.head.module, params["head"], tokens, features, cache, offsets, seen, own=True,
                                  skip=(level - 1) * self.tree.top_k)

    def _best(self, params: Any, features: Float[Array, "M D"]) -> tuple[Float[Array, "M K"], Int32[Array, "M K"]]:
        """Log-probabilities and target ids of each row's top_k tokens."""
        logits = side_by_side.apply(self.head.module, params["head"], features, method="logits")
        scores, ids = top_k_kernels.log_softmax_top_k(logits, self.tree.top_k)
        return scores, ids if params["ids"] is None else params["ids"][ids]
