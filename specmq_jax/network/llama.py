"""The decoder as a functional Flax module: Llama, and the families that `LlamaConfig` describes."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partials import add_up
from specmq_jax.formats import DenseFormat, WeightFormat
from specmq_jax.network.cache import Cache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.layers import AddNorm, Embedding, Layer, Linear
from specmq_jax.network.module import Module


class Llama(Module):
    """Token ids to hidden states over a KV cache, and hidden states to logits.

    Attributes:
      config: sizes.
      format: of the layers' linear weights; its dtype is also the cache's.
      head_format: of lm_head, where it is not tied to the embedding.
      embed_format: a dense format, of the embedding table.
      capture: layers whose entering residual streams a drafter reads; empty where it reads the final states.
      reproducible: on a GPU a row's states and logits have the same bits whatever tree it stands in, for trees of at most
        `rows.MOST_DECODE_ROWS` nodes and `formats.MOST_REPRODUCIBLE_ROWS` of all sequences together; of the other operations
        each computes a row, or an element, by itself.
      implementation: of the kernels, None for the backend's own. With "reference" and dense formats the network can be
        differentiated.
    """

    config: LlamaConfig
    format: WeightFormat
    head_format: WeightFormat
    embed_format: DenseFormat
    capture: tuple[int, ...] = ()
    reproducible: bool = False
    implementation: str | None = None

    def setup(self) -> None:
        config, how = self.config, (self.reproducible, self.implementation)
        self.embed = Embedding(config.vocab_size, config.hidden_size, self.embed_format, *how)
        self.layers = [Layer(config, self.format, *how, index=i) for i in range(config.num_layers)]
        self.norm = AddNorm(config.rms_norm_eps, self.format, *how, centred=config.norm == "layer",
                            with_bias="norm" in config.biases)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.vocab_size, self.head_format, *how)

    def __call__(self, tokens: Int32[Array, "M"], cache: Cache, depth: Int32[Array, "M"] | None = None,
                 mask: Bool[Array, "M M"] | None = None) -> tuple[Float[Array, "M D"], Float[Array, "M F"], Cache]:
        """Runs M rows that stand behind the cache's committed ones, or those of whole sequences one behind the other.

        Args:
          tokens: ids.
          cache: a `KVCache`, whose rows [length, length + M) are overwritten and whose length stays (the caller commits what it
            accepts), or another cache, which knows where the rows stand and what they see.
          depth: of each row in a draft tree, so its position is length + depth; None for consecutive rows.
          mask: bool[M, M], which of these rows each row sees besides all committed ones; None for causal.

        Returns:
          The states after the final norm in the layers' dtype, what a drafter reads (the captured streams joined in
          f32, else those same states), and the cache.
        """
        rows = cache.rows(self.config, len(tokens), depth, mask, reproducible=self.reproducible)
        residual, update, captured, layers = self._embedded(tokens), None, {}, list(cache.layers)
        for i, layer in enumerate(self.layers):
            captured[i], residual, update, layers[i] = layer(residual, update, rows, layers[i])
        _, normed = self.norm(residual, update)
        hidden = normed.values
        features = jnp.concatenate([captured[i] for i in self.capture], axis=-1) if self.capture else hidden
        return hidden, features, cache.replace(layers=tuple(layers))

    def logits(self, hidden: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """f32 logits of final-norm states."""
        config = self.config
        scores = self.embed.attend(hidden) if config.tie_embeddings else add_up(self.lm_head(hidden))
        if config.logit_multiplier != 1:
            scores = scores * config.logit_multiplier
        return scores if config.logit_cap is None else config.logit_cap * jnp.tanh(scores / config.logit_cap)

    def everything(self, tokens: Int32[Array, "M"], cache: Cache) -> Float[Array, "M V"]:
        """Touches every parameter: `init(key, tokens, cache, method="everything")` makes random weights."""
        return self.logits(self(tokens, cache)[0])

    def _embedded(self, tokens: Int32[Array, "M"]) -> Float[Array, "M D"]:
        factor = self.config.embedding_multiplier
        return self.embed(tokens) if factor == 1 else self.embed(tokens) * factor
