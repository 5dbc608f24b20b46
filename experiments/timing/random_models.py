"""Models and heads of real sizes with random weights, and the drafters made of them: right for speed, useless for quality."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import specmq_jax as sm
from specmq_jax import formats
from specmq_jax.decoding.drafters.vocabulary import cut_vocabulary
from specmq_jax.errors import UserError
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.eagle import EagleConfig, EagleHead

EAGLE3_VOCABULARY = 32000
"""Tokens that the official EAGLE-3 heads for Llama 3 score."""


def random_head(target: sm.Model, version: int, vocabulary: int | None = None, *, seed: int = 0) -> sm.Head:
    """A head of one layer of the target's sizes, dense in its activations' dtype.

    An EAGLE-2 head scores with the target's lm_head, an EAGLE-3 head with one of its own. Embeddings are the target's.

    Args:
      target: for which it drafts.
      version: 2 or 3.
      vocabulary: tokens that it scores, drawn at random; 0 is all, None all for EAGLE-2 and 32000 for EAGLE-3.
      seed: of weights and tokens.

    Raises:
      UserError: more tokens than the target has.
    """
    config, own = target.config, version == 3
    if vocabulary is None:
        vocabulary = min(EAGLE3_VOCABULARY, config.vocab_size) if own else 0
    if vocabulary > config.vocab_size:
        raise UserError(f"a head that scores {vocabulary} tokens does not fit a target of {config.vocab_size}")
    cut = 0 < vocabulary < config.vocab_size
    ranked = np.random.default_rng(seed).permutation(config.vocab_size).astype(np.int32)
    layer = config.as_llama(num_layers=1, tie_embeddings=False, vocab_size=vocabulary if own and cut else config.vocab_size)
    sizes = EagleConfig(version=version, layer=layer, feature_size=config.hidden_size * (3 if own else 1),
                        vocab_size=config.vocab_size, embed_size=config.hidden_size,
                        tied_head=not own and config.tie_embeddings)
    dense = next(form for name in ("fp32", "bf16", "fp16")
                 if (form := formats.get(name)).dtype == target.module.format.dtype)
    module = EagleHead(sizes, dense, dense if own else target.module.head_format, target.module.embed_format)
    params = _head_parameters(module, target, jax.random.key(seed))
    ids = jnp.asarray(np.sort(ranked[:vocabulary])) if own and cut else None
    head = sm.Head(config=sizes, module=module, capture=sizes.capture(config.num_layers),
                   params={"head": {"params": params}, "ids": ids})
    return cut_vocabulary(head, ranked, vocabulary) if cut and not own else head


def _head_parameters(module: EagleHead, target: sm.Model, key: Array) -> dict[str, Any]:
    sizes, targets = module.config, target.params["params"]
    shared = {"embed": targets["embed"]}
    if sizes.tied_head:
        shared["output_table"] = targets["embed"]
    elif sizes.version == 2:
        shared["lm_head"] = targets["lm_head"]

    @jax.jit
    def own(key: Array) -> dict[str, Any]:
        cache = KVCache.create(sizes.layer, 128, module.format.dtype)
        made = module.init(key, jnp.zeros(1, jnp.int32), jnp.zeros((1, sizes.feature_size)), cache, method="everything")
        return {name: part for name, part in made["params"].items() if name not in shared}

    return own(key) | shared


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Drafting:
    """What the methods draft with.

    Attributes:
      tree: of the target's own EAGLE head.
      vocabulary: tokens that heads score, as in `random_head`.
      small: sizes of the small model that drafts for spec and hier.
      precision: of its weights.
      length: tokens that it drafts a round for spec.
      inner: tree of the EAGLE-2 head that drafts for it in hier.
      min_length, model_start: as in `specmq_jax.HierarchicalDrafter`.
    """

    tree: sm.TreeConfig = sm.TreeConfig()
    vocabulary: int | None = None
    small: LlamaConfig
    precision: str = "w4a16"
    length: int = 4
    inner: sm.TreeConfig = sm.TreeConfig(depth=3, top_k=10, size=30)
    min_length: int = 6
    model_start: bool = False

    @functools.cached_property
    def small_model(self) -> sm.Model:
        return sm.random_model(self.small, self.precision, seed=1)

    @functools.cached_property
    def inner_drafter(self) -> sm.EagleDrafter:
        return sm.EagleDrafter(random_head(self.small_model, 2, self.vocabulary, seed=2), self.inner)

    def drafter(self, method: str, target: sm.Model) -> sm.Drafter:
        """The method's drafter for a target.

        Raises:
          UserError: weights that the device has no room for, or a tree or vocabulary that the target doesn't allow.
        """
        if method == "baseline":
            return sm.NoDrafter()
        if method == "spec":
            return sm.ChainDrafter(self.small_model, self.length)
        if method == "hier":
            return sm.HierarchicalDrafter(self.small_model, self.inner_drafter, self.min_length, self.model_start)
        version = {"eagle2": 2, "eagle3": 3}[method]
        return sm.EagleDrafter(random_head(target, version, self.vocabulary, seed=3), self.tree)
