"""Bytes that decoding must move: each weight once for every pass that uses it, and the live rows of that pass's cache."""

from collections.abc import Callable

import jax

import specmq_jax as sm
from specmq_jax.cache import KVCache


def row_bytes(new_cache: Callable[[int], KVCache]) -> int:
    """Bytes of one token in the cache that `new_cache(max_len)` makes, all layers together."""
    cache = jax.eval_shape(lambda: new_cache(1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.keys, *cache.values))


def pass_bytes(model: sm.Model, live: int) -> int:
    """Bytes of one pass of a model over a few rows behind `live` tokens."""
    return model.weight_bytes + live * row_bytes(model.new_cache)


def draft_bytes(drafter: sm.Drafter, live: int, inner_rounds: float = 0) -> float:
    """Bytes of one `propose` behind `live` tokens; `inner_rounds` is how many rounds a hierarchical one takes."""
    match drafter:
        case sm.EagleDrafter():
            levels = drafter.tree.depth - 1
            return drafter.tree.depth * _scoring_bytes(drafter.head) + levels * _layer_bytes(drafter.head, live, own=True)
        case sm.ChainDrafter():
            return drafter.length * pass_bytes(drafter.model, live)
        case sm.HierarchicalDrafter():
            return inner_rounds * round_bytes(drafter.model, drafter.inner, live)
    return 0


def round_bytes(target: sm.Model, drafter: sm.Drafter, live: int, inner_rounds: float = 0) -> float:
    """Bytes of a whole round: propose, verify, advance."""
    inner = drafter.inner if isinstance(drafter, sm.HierarchicalDrafter) else drafter
    advance = _layer_bytes(inner.head, live, own=False) if isinstance(inner, sm.EagleDrafter) else 0
    return draft_bytes(drafter, live, inner_rounds) + pass_bytes(target, live) + advance


def _scoring_bytes(head: sm.Head) -> int:
    params = head.params["head"]["params"]
    return _bytes(params["output_table" if head.config.tied_head else "lm_head"])


def _layer_bytes(head: sm.Head, live: int, *, own: bool) -> int:
    """Of a head's layers; on its own features an EAGLE-3 head leaves out `fc`."""
    skipped = _bytes(head.params["head"]["params"]["fc"]) if own and head.config.version == 3 else 0
    return head.weight_bytes - _scoring_bytes(head) - skipped + live * row_bytes(head.new_cache)


def _bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
