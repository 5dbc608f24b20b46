"""EAGLE-1/2 and EAGLE-3 heads as one functional Flax module, chosen by configuration.

A row pairs a token x_{t+1} with the target's state at position t and predicts x_{t+2}. Papers: arXiv 2406.16858 (EAGLE-2),
arXiv 2503.01840 (EAGLE-3).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partials import add_up
from specmq_jax.formats import DenseFormat, WeightFormat
from specmq_jax.network.cache import Cache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.hf_options import refuse_unsupported
from specmq_jax.network.layers import AddNorm, Attention, Embedding, Layer, Linear, Mlp, Normed
from specmq_jax.network.module import Module

ROTATED_TARGET = "rotated_target"
"""The entry of config.json by which an EAGLE-3 head says that it was made for a rotated target."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """Sizes of a head.

    Attributes:
      version: 2 (EAGLE-1 heads are the same network) or 3.
      layer: the head's decoder layers; its vocab_size is the one the head scores, which may be cut to frequent tokens.
      feature_size: width of the target's states that `fc` reads.
      vocab_size: tokens of the embedding table, the target's vocabulary.
      embed_size: width of the embedding table.
      bias: `fc` has one.
      rotated: the target's states are in a rotated basis, which `rotation` undoes before `fc` (the norm's weight folded in).
      rotated_target: they are, whether `rotation` or, in EAGLE-3, `fc` undoes it.
      tied_head: logits come from the embedding table of a target with tied embeddings.
      streams: target layers whose entering residual streams an EAGLE-3 head reads; empty for the usual three.
    """

    version: int
    layer: LlamaConfig
    feature_size: int
    vocab_size: int
    embed_size: int
    bias: bool = False
    rotated: bool = False
    rotated_target: bool = False
    tied_head: bool = False
    streams: tuple[int, ...] = ()

    def capture(self, target_layers: int) -> tuple[int, ...]:
        """Target layers whose entering residual streams EAGLE-3 reads, usually 2, the middle, the third from the end."""
        if self.version == 2:
            return ()
        return self.streams or (2, target_layers // 2, target_layers - 3)


class EagleHead(Module):
    """Drafts features and logits from tokens and states; needs no target while a tree grows.

    `implementation` is as in `Llama`.
    """

    config: EagleConfig
    format: WeightFormat
    head_format: WeightFormat
    embed_format: DenseFormat
    implementation: str | None = None

    def setup(self) -> None:
        config, layer, how = self.config, self.config.layer, (False, self.implementation)
        self.embed = Embedding(config.vocab_size, config.embed_size, self.embed_format, *how)
        self.fc = Linear(layer.hidden_size, self.format, *how)
        if config.bias:
            self.fc_bias = self.param("fc_bias", nn.initializers.zeros_init(), (layer.hidden_size,), jnp.float32)
        self.attention = Attention(layer, self.format, *how)
        self.mlp_norm = AddNorm(layer.rms_norm_eps, self.format, *how)
        self.mlp = Mlp(layer.intermediate_size, self.format, *how)
        self.layers = [Layer(layer, self.format, *how) for _ in range(layer.num_layers - 1)]
        if config.rotated:
            self.rotation = Linear(config.feature_size, self.format, *how)
        if config.version == 3:
            self.embed_norm = AddNorm(layer.rms_norm_eps, self.format, *how)
            self.state_norm = AddNorm(layer.rms_norm_eps, self.format, *how)
            self.norm = AddNorm(layer.rms_norm_eps, self.format, *how)
        if config.tied_head:
            self.output_table = Embedding(layer.vocab_size, layer.hidden_size, self.embed_format, *how)
        else:
            self.lm_head = Linear(layer.vocab_size, self.head_format, *how)

    def __call__(self, tokens: Int32[Array, "M"], states: Float[Array, "M F"], cache: Cache,
                 offsets: Int32[Array, "M"] | None, mask: Bool[Array, "M C"] | None, *, own: bool, skip: int = 0
                 ) -> tuple[Float[Array, "M D"], Cache]:
        """Features f32[M, D] of M rows behind the cache's committed ones.

        Args:
          tokens: ids in the target's vocabulary.
          states: the target's, or with `own` the head's own features (which EAGLE-3 takes without `fc`).
          cache: its length stays.
          offsets: positions of the rows from the cache's length; None for consecutive rows.
          mask: which rows behind the committed ones each row sees; None for causal.
          own: says whose `states` are.
          skip: rows of earlier levels behind the committed ones, which stay in the cache.
        """
        rows = cache.rows(self.config.layer, len(tokens), offsets, mask, skip=skip)
        residual, x = self._joined(self.embed(tokens), states, own)
        layers = list(cache.layers)
        update, layers[0] = self.attention(x, rows, layers[0])
        residual, x = self.mlp_norm(residual, update, deferred=True)
        update = self.mlp(x)
        for i, layer in enumerate(self.layers, start=1):
            _, residual, update, layers[i] = layer(residual, update, rows, layers[i])
        return residual + add_up(update), cache.replace(layers=tuple(layers))

    def logits(self, features: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """f32 scores over the head's vocabulary."""
        if self.config.version == 3:
            features = self.norm(features, None)[1].values
        return self.output_table.attend(features) if self.config.tied_head else self.lm_head(features).sum(0)

    def everything(self, tokens: Int32[Array, "M"], states: Float[Array, "M F"], cache: Cache) -> Float[Array, "M V"]:
        """Touches every parameter, for `init`."""
        return self.logits(self(tokens, states, cache, None, None, own=False)[0])

    def _joined(self, embedded: Float[Array, "M E"], states: Float[Array, "M F"], own: bool
                ) -> tuple[Float[Array, "M D"], Normed]:
        """The residual stream and the attention's input."""
        dtype = self.format.dtype
        if self.config.rotated and not own:
            states = self.rotation(states.astype(dtype)).sum(0)
        if self.config.version == 3:
            residual = states.astype(jnp.float32) if own else self.fc(states.astype(dtype)).sum(0)
            parts = self.embed_norm(embedded, None)[1].values, self.state_norm(residual, None)[1].values
            return residual, Normed(jnp.concatenate(parts, axis=-1))
        residual = self.fc(jnp.concatenate([embedded.astype(dtype), states.astype(dtype)], axis=-1)).sum(0)
        if self.config.bias:
            residual = residual + self.fc_bias
        return residual, Normed(residual.astype(dtype))


def eagle_version(names: Iterable[str]) -> int:
    """2 or 3, from the names of an official head's tensors; EAGLE-1 heads are of kind 2."""
    return 3 if any(name.startswith("midlayer.") for name in names) else 2


def eagle_config(head: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], target: LlamaConfig) -> EagleConfig:
    """The configuration of an official head from its config.json and the shapes of its tensors.

    The head's own file rules its rope, eps and sizes (nothing is inherited from the target); the tensors that are there
    decide version, bias and the vocabulary it scores. Rules: SafeAILab/EAGLE's modules `cnets.py` and `cnets1.py`.
    """
    version = eagle_version(tensors)
    hidden = tensors["fc.weight"][0]
    refuse_unsupported(head)
    own = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": target.vocab_size}
    layer = LlamaConfig.from_hf({**own, **head, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                                 "hidden_size": hidden})
    scored = tensors["lm_head.weight"][0] if "lm_head.weight" in tensors else target.vocab_size
    layer = dataclasses.replace(layer, vocab_size=scored)
    embed_size = tensors["embed_tokens.weight"][1] if "embed_tokens.weight" in tensors else target.hidden_size
    feature_size = tensors["fc.weight"][1] - (0 if version == 3 else embed_size)
    rotated = "rms_norm_rotation.weight" in tensors
    return EagleConfig(
        version=version, layer=layer, feature_size=feature_size, vocab_size=target.vocab_size, embed_size=embed_size,
        rotated=rotated, rotated_target=rotated or (version == 3 and bool(head.get(ROTATED_TARGET))),
        bias=version == 2 and "fc.bias" in tensors and head.get("bias", True),
        tied_head="lm_head.weight" not in tensors and target.tie_embeddings)
