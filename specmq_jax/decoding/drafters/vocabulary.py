"""Frequency-ranked vocabulary: a head that scores only the most frequent tokens (FR-Spec, arXiv 2502.14856).

The target still verifies over its whole vocabulary, so the output stays what it was; the head's lm_head, the largest part of a
draft step, shrinks.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.loading.head import Head

FORMAT = "specmq-ranked-vocabulary"


def rank(token_ids: Iterable[Iterable[int]], vocab_size: int) -> Int32[np.ndarray, "V"]:
    """All ids of a vocabulary, the most frequent in the given sequences first; ties go to the lower id."""
    counts = Counter[int]()
    for sequence in token_ids:
        counts.update(sequence)
    return np.asarray(sorted(range(vocab_size), key=lambda token: (-counts[token], token)), np.int32)


def read_ranking(path: str | pathlib.Path) -> tuple[Int32[np.ndarray, "V"], int]:
    """The ranked ids of a file that `checkpoints_tools.rank_vocabulary` wrote, and the size of their vocabulary.

    Raises:
      UserError: another kind of file, an entry that is missing or of the wrong kind, or ids that repeat or lie outside
        the vocabulary.
    """
    content = read_json(pathlib.Path(path))
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is no ranked vocabulary; make one with python -m checkpoints_tools.rank_vocabulary")
    size = entries.integer(str(path), "vocab_size", content.get("vocab_size"))
    ids = np.asarray(entries.integers(str(path), "token_ids", content.get("token_ids")), np.int32)
    if len(set(ids.tolist())) < len(ids) or not len(ids) or ids.max() >= size:
        raise UserError(f"{path} must rank distinct token ids below {size}")
    return ids, size


def cut_vocabulary(head: Head, ranked: Int32[np.ndarray, "N"], size: int) -> Head:
    """The head scoring only the `size` first ids of a ranking.

    Args:
      head: one that scores the target's whole vocabulary, or the outline of one.
      ranked: token ids, most frequent first.
      size: how many stay.

    Raises:
      UserError: a head whose own vocabulary is cut already, or a size that the ranking does not have.
    """
    if head.params["ids"] is not None:
        raise UserError(f"this head scores a vocabulary of {head.config.layer.vocab_size} of its own, which can't be cut")
    if not entries.is_integer(size) or not 0 < size <= len(ranked) or ranked.max() >= head.config.vocab_size:
        raise UserError(f"a vocabulary of {entries.shown(size)} tokens can't be cut from {len(ranked)} ranked ids for a "
                        f"target of {head.config.vocab_size}")
    ids = jnp.asarray(np.sort(ranked[:size]))
    tree: dict[str, Any] = dict(head.params["head"]["params"])
    if head.config.tied_head:
        tree["output_table"] = {"table": _of(tree["output_table"]["table"], lambda table: table[ids])}
    else:
        form = head.module.head_format
        tree["lm_head"] = {"w": _of(tree["lm_head"]["w"], lambda weight: form.outputs(weight, ids))}
    config = dataclasses.replace(head.config, layer=dataclasses.replace(head.config.layer, vocab_size=size))
    return dataclasses.replace(head, config=config, module=head.module.clone(config=config),
                               params={"head": {"params": tree}, "ids": ids})


def _of(whole: Any, part: Callable[[Any], Any]) -> Any:
    """A part of an array or a weight, or of an outline the shapes that it would have."""
    is_outline = isinstance(jax.tree.leaves(whole)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(part, whole) if is_outline else part(whole)
