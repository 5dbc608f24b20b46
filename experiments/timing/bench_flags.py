"""Flags of the benchmarks at real sizes with random weights."""

from collections.abc import Collection, Sequence

from absl import flags as absl_flags

from experiments.timing.random_models import Drafting
from experiments.timing.sizes import SHAPES, shape, small_shape
from specmq_jax import formats
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.errors import UserError

_SHARED = ("precision", "methods", "draft_precision", "draft_length", "min_draft_length", "draft_model_start", "tree_depth",
           "tree_top_k", "tree_size", "reproducible")


def precisions() -> tuple[str, ...]:
    """Of the target."""
    return tuple(formats.get(name).name for name in (absl_flags.FLAGS.precision or "w4a16").split(","))


def head_precision() -> str | None:
    """Of the target's lm_head."""
    name = absl_flags.FLAGS.head_precision
    return formats.get(name).name if name else None


def methods(known: Collection[str], *default: str) -> tuple[str, ...]:
    """Ways of drafting, of those that are known."""
    return chosen("methods", known, absl_flags.FLAGS.methods or default)


def drafting(tree: TreeConfig) -> Drafting:
    """What the methods draft with; by default a head's tree is that given."""
    given = absl_flags.FLAGS
    return Drafting(
        tree=_tree(given.tree_depth, given.tree_top_k, given.tree_size, tree), vocabulary=given.draft_vocab,
        small=shape(given.draft_shape or small_shape(given.shape)),
        precision=formats.get(given.draft_precision or "w4a16").name, length=given.draft_length,
        inner=_tree(given.inner_depth, given.inner_top_k, given.inner_size, Drafting.inner),
        min_length=given.min_draft_length or Drafting.min_length, model_start=given.draft_model_start)


def _tree(depth: int | None, top_k: int | None, size: int | None, default: TreeConfig) -> TreeConfig:
    """The default's size is cut to what the other two allow."""
    depth, top_k = depth or default.depth, top_k or default.top_k
    return TreeConfig(depth=depth, top_k=top_k, size=size or TreeConfig.fitting(depth, top_k, default.size).size)


def chosen(flag: str, known: Collection[str], found: Sequence[str] = ()) -> tuple[str, ...]:
    """What a flag of names lists, or what it stands for where it was not given; a name that is not known, or none, is a
    `UserError`."""
    found = found or absl_flags.FLAGS[flag].value or ()
    for name in found:
        if name not in known:
            raise UserError(f"--{flag} names {name!r}, which is not known; choose of {', '.join(known)}")
    if not found or len(set(found)) < len(found):
        raise UserError(f"--{flag}={','.join(found)} must name one or more of {', '.join(known)}, each once")
    return tuple(found)


def counts(flag: str) -> tuple[int, ...]:
    """The whole numbers that a flag lists, each once; anything else is a `UserError`."""
    found = absl_flags.FLAGS[flag].value
    if not found or not all(item.isdecimal() and int(item) > 0 for item in found):
        raise UserError(f"--{flag}={','.join(found)} must list whole numbers above 0")
    return tuple(dict.fromkeys(map(int, found)))


def declare_flags() -> None:
    """Declares those that the benchmarks share; not at import, where they would clash with those of other commands."""
    for name in _SHARED:
        absl_flags.declare_key_flag(name)
    absl_flags.DEFINE_string("shape", "llama3-8b", f"Sizes of the target: {', '.join(SHAPES)}, or a directory with a "
                             "Hugging Face config.json, of which only the sizes are read.")
    absl_flags.DEFINE_string("draft_shape", None, "Sizes of the small model of methods spec and hier, given like --shape. "
                             "Default: llama3-8b for llama3-70b, llama3-1b for llama3-8b, the target's own for others.")
    absl_flags.DEFINE_string("head_precision", None, "Of the target's lm_head, by which an EAGLE-2 head drafts, too. "
                             "Default: dense.")
    absl_flags.DEFINE_integer("draft_vocab", None, "Tokens that an EAGLE head scores, as with a frequency-ranked vocabulary; 0 "
                              "is all. Default: all for EAGLE-2, 32000 for EAGLE-3.", lower_bound=0)
    absl_flags.DEFINE_integer("inner_depth", None, "Levels of the tree that drafts for hier's small model. Default: 3.",
                              lower_bound=1)
    absl_flags.DEFINE_integer("inner_top_k", None, "Candidates of each of its nodes, and nodes kept of each level. "
                              "Default: 10.", lower_bound=1)
    absl_flags.DEFINE_integer("inner_size", None, "Nodes of it that the small model verifies, the root counted. Default: 30, "
                              "fewer where the other two allow no more.", lower_bound=2)
