"""Bytes that decoding must move: each weight once for every pass that uses it, and the live rows of that pass's cache."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from specmq_jax.decoding.drafters import ChainDrafter, Drafter, EagleDrafter, HierarchicalDrafter
from specmq_jax.loading.head import Head
from specmq_jax.loading.memory import tree_bytes
from specmq_jax.loading.model import Model
from specmq_jax.network.cache import KVCache


def row_bytes(new_cache: Callable[[int], KVCache]) -> int:
    """Bytes of one token in the cache that `new_cache(max_len)` makes, all layers together."""
    cache = jax.eval_shape(lambda: new_cache(1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


def pass_bytes(model: Model, live: int) -> int:
    """Bytes of one pass of a model over a few rows behind `live` tokens."""
    return model.weight_bytes + live * row_bytes(model.new_cache)


def draft_bytes(drafter: Drafter, live: int, inner_rounds: float = 0) -> float:
    """Bytes of one `propose` behind `live` tokens; `inner_rounds` is how many rounds a hierarchical one takes. A drafter of
    another kind counts with all its arrays at each of its levels."""
    match drafter:
        case EagleDrafter():
            levels = drafter.tree.depth - 1
            return drafter.tree.depth * _scoring_bytes(drafter.head) + levels * _layer_bytes(drafter.head, live, own=True)
        case ChainDrafter():
            return drafter.length * pass_bytes(drafter.model, live)
        case HierarchicalDrafter():
            return inner_rounds * round_bytes(drafter.model, drafter.inner, live)
    return drafter.max_depth * tree_bytes(drafter.params)


def round_bytes(target: Model, drafter: Drafter, live: int, inner_rounds: float = 0, ahead: float = 0) -> float:
    """Bytes of a whole round behind `live` tokens: propose, verify, advance.

    Args:
      target: verifies in one pass.
      drafter: drafts for it.
      live: tokens in the caches of the target and the drafter.
      inner_rounds: rounds of a hierarchy's small model in it, each with a draft, a pass and an advance of its own.
      ahead: passes of the small model in it that go a token ahead.
    """
    advance = 0.0
    if isinstance(drafter, HierarchicalDrafter):
        advance = ahead * pass_bytes(drafter.model, live) + _layer_bytes(drafter.inner.head, live, own=False)
    elif isinstance(drafter, EagleDrafter):
        advance = _layer_bytes(drafter.head, live, own=False)
    return draft_bytes(drafter, live, inner_rounds) + pass_bytes(target, live) + advance


def rounds_ahead(drafter: HierarchicalDrafter, accepted: Iterable[int], inner: Iterable[int]) -> int:
    """Rounds behind which a hierarchy's small model goes a token ahead.

    Args:
      drafter: the hierarchy.
      accepted: accept length of each round.
      inner: those of the small model's rounds; of an iterator no more is taken than these rounds had.
    """
    lengths, ahead, total = iter(inner), False, 0
    for length in accepted:
        drafted = int(ahead)
        while drafted < drafter.min_draft_length:
            drafted += int(next(lengths))
        ahead = length > drafted or drafter.draft_model_start
        total += ahead
    return total


def _scoring_bytes(head: Head) -> int:
    params = head.params["head"]["params"]
    return tree_bytes(params["output_table" if head.config.tied_head else "lm_head"])


def _layer_bytes(head: Head, live: int, *, own: bool) -> int:
    """Of a head's layers. On its own features it needs no rotation, and an EAGLE-3 head no `fc`."""
    skipped = 0
    if own:
        params: dict[str, Any] = head.params["head"]["params"]
        skipped = sum(tree_bytes(params[name]) for name in ("rotation", "fc")
                      if name in params and (name == "rotation" or head.config.version == 3))
    return head.weight_bytes - _scoring_bytes(head) - skipped + live * row_bytes(head.new_cache)
