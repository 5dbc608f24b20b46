"""One verification: the target's choice at every node of a draft tree, and what of the tree it keeps."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int32

from specmq_jax.cache import KVCache
from specmq_jax.llama import Llama
from specmq_jax.tree import Accepted, DraftTree

Choose = Callable[[Float[Array, "T V"]], Int32[Array, "T"]]


def verify(module: Llama, params: Any, cache: KVCache, tree: DraftTree, choose: Choose) -> tuple[Accepted, KVCache]:
    """Runs the tree behind the cache's committed rows, accepts, and commits the accepted path's rows.

    Args:
      module, params: the verifying model.
      cache: its length is the root's position.
      tree: the draft.
      choose: logits f32[T, V] of the nodes to the token drawn after each.
    """
    hidden, features, cache = module.apply(params, tree.tokens, cache, tree.depth, tree.mask)
    accepted = tree.accept(choose(module.apply(params, hidden, method="logits")))
    cache = cache.keep(accepted.path, accepted.count, in_place=tree.is_chain)
    return accepted.replace(features=features[accepted.path]), cache
