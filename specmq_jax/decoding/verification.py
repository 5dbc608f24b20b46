"""One verification: the target's choice at every node of a draft tree, and what of the tree it keeps."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache
from specmq_jax.network.llama import Llama

Choose = Callable[[Float[Array, "T V"]], Int32[Array, "T"]]


def verify(module: Llama, params: Any, cache: KVCache, tree: DraftTree, choose: Choose) -> tuple[Accepted, KVCache]:
    """Runs the tree behind the cache's committed rows, accepts, and commits the accepted path's rows.

    Args:
      module, params: the verifying model.
      cache: its length is the root's position.
      tree: the draft.
      choose: logits f32[T, V] of the nodes to the token drawn after each.
    """
    hidden, features, cache = side_by_side.apply(module, params, tree.tokens, cache, tree.depth, tree.mask)
    logits = side_by_side.apply(module, params, hidden, method="logits")
    chosen = choose(logits)
    accepted = tree.accept(chosen)
    cache = cache.keep(accepted.path, accepted.count, in_place=tree.is_chain)
    return accepted.replace(features=features[accepted.path], sound=are_sound(logits, chosen)[accepted.path]), cache


def are_sound(logits: Float[Array, "T V"], chosen: Int32[Array, "T"]) -> Bool[Array, "T"]:
    """Whether the states behind some rows of logits are finite, by the logit of the token that was drawn from each.

    A state with a NaN scores every token NaN, one with an infinity the best token infinite or NaN.
    """
    return jnp.isfinite(jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0])
