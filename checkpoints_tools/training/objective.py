"""What a head is trained on: its drafts along the target's own answers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from checkpoints_tools.training import batched
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.eagle import EagleConfig

Batch = dict[str, Array]
"""The arrays of `rows.Rows`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Loss over `steps` successive drafts from every row.

    Attributes:
      target, head: sizes.
      steps: drafts, each from the head's own feature of the one before.
      decay: weight of a draft over the one before it (EAGLE-3's 0.8).
      regression: weight of the smooth L1 distance between features and the target's states (EAGLE-2 heads only).
      dtype: of the head's products; its parameters and the loss are f32.
    """

    target: LlamaConfig
    head: EagleConfig
    steps: int
    decay: float = 0.8
    regression: float = 0.1
    dtype: Any = jnp.bfloat16

    def __call__(self, params: Any, target: batched.Params, ids: Int32[Array, "V"] | None, batch: Batch
                 ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and sums over the batch that `summarise` turns into figures.

        Args:
          params: the head's, f32.
          target: the target's, dense.
          ids: target id of each token the head scores; None where it scores all.
          batch: rows.
        """
        tokens, segments, positions, answer = (batch[k] for k in ("tokens", "segments", "positions", "answer"))
        mask = jnp.tri(tokens.shape[1], dtype=bool) & (segments[:, :, None] == segments[:, None, :])
        hidden, states = self._observed(target, tokens, positions, mask)
        cast = jax.tree.map(lambda leaf: leaf.astype(self.dtype) if leaf.ndim > 1 else leaf, params)
        embedded = target["embed"]["table"][tokens]
        features = batched.unrolled_features(self.head, cast, embedded, states, positions, mask, steps=self.steps,
                                             length=tokens.shape[1])
        output = self._output(cast, target)
        labels = batched.target_logits(target, hidden)
        best = jnp.argmax(labels, axis=-1)
        known = jnp.ones(best.shape, bool)
        if ids is not None:
            labels, known = labels[..., ids], jnp.zeros(self.head.vocab_size, bool).at[ids].set(True)[best]
        loss, figures, alive, inside = 0.0, [], jnp.ones_like(known), segments > 0
        for step, feature in enumerate(features):
            # row t predicts the token at t + 2 + step, which the target scores at t + 1 + step
            counted = (batched.shift(segments, step + 2) == segments) & (segments > 0) & batched.shift(answer, step + 2)
            seen = batched.shift(known, step + 1)
            cross_entropy, drafted = _cross_entropy(self, step, cast, feature, output, labels)
            term = _mean(cross_entropy, counted & seen)
            if self.head.version == 2:
                distance = optax.losses.huber_loss(feature, batched.shift(hidden, step + 1).astype(jnp.float32)).mean(-1)
                term += self.regression * _mean(distance, counted)
            loss += self.decay**step * term
            drafted = drafted if ids is None else ids[drafted]
            hit = seen & (drafted == batched.shift(best, step + 1))
            alive, inside = alive & hit, inside & counted
            figures.append(jnp.stack([x.sum() for x in (counted, hit & counted, inside, alive & inside)]))
        return loss, {"counts": jnp.stack(figures).astype(jnp.float32), "loss": loss}

    def _observed(self, target: batched.Params, tokens: Array, positions: Array, mask: Bool[Array, "B S S"]
                  ) -> tuple[Array, Array]:
        capture = self.head.capture(self.target.num_layers)

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            del layer
            return batched.attention(q, batched.heads_first(k), batched.heads_first(v), mask)

        found = batched.target_states(self.target, target, tokens, positions, attend, length=tokens.shape[1],
                                      capture=capture)
        return jax.lax.stop_gradient(found)

    def _output(self, params: Any, target: batched.Params) -> Float[Array, "D V"]:
        if "lm_head" in params:
            return params["lm_head"]["w"]
        return (target["lm_head"]["w"] if "lm_head" in target else target["embed"]["table"].T).astype(self.dtype)


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _cross_entropy(objective: Objective, step: int, params: Any, feature: Float[Array, "B S D"],
                   output: Float[Array, "D V"], labels: Float[Array, "B S V"]
                   ) -> tuple[Float[Array, "B S"], Int32[Array, "B S"]]:
    """Against the target's distribution, row by row, and the best draft; computed again in the backward pass, since a
    batch's scores over a whole vocabulary are by far its largest arrays."""
    scores = batched.head_logits(objective.head, params, feature, output)
    expected = batched.shift(jax.nn.softmax(labels, axis=-1), step + 1)
    return -(expected * jax.nn.log_softmax(scores, axis=-1)).sum(-1), jnp.argmax(scores, axis=-1)


def _mean(values: Float[Array, "B S"], where: Bool[Array, "B S"]) -> Float[Array, ""]:
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How good a head's drafts are.

    Attributes:
      hit_rates: of each draft, the share that is the target's own choice, whatever came before.
      accept_length: tokens a round would commit on average if a chain of single drafts were verified.
    """

    hit_rates: tuple[float, ...]
    accept_length: float

    @classmethod
    def of(cls, counts: Float[Array, "J 4"]) -> "Acceptance":
        """From the sum of the objective's `counts` over batches."""
        counted, hits, inside, alive = (counts[:, i].clip(1e-9) for i in range(4))
        return cls(hit_rates=tuple((hits / counted).tolist()), accept_length=1 + float((alive / inside).sum()))
