"""What a head is trained on: its drafts along the target's own answers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from specmq_jax.formats import Dense, DenseFormat
from specmq_jax.loading.model import Model, Params
from specmq_jax.network.eagle import EagleConfig, EagleHead
from specmq_jax.network.llama import Llama
from specmq_jax.network.sequences import Sequences

Batch = dict[str, Array]
"""The arrays of `rows.Rows`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Loss over `steps` successive drafts from every row.

    Draft j of row t takes the token at t + 1 + j and, from j = 1 on, the head's own feature of draft j - 1. It stands at
    position t + j and sees the rows of its sequence up to t and the row's own drafts before it, as in a growing chain of a
    draft tree: EAGLE-3's training-time test (arXiv 2503.01840), and HASS's (arXiv 2408.15766) for an EAGLE-2 head.

    Attributes:
      target: dense, and captures what the head reads.
      head: of one layer, and dense; its parameters and the loss are f32 whatever its format.
      steps: drafts, each from the head's own feature of the one before.
      decay: weight of a draft over the one before it (EAGLE-3's 0.8).
      regression: weight of the smooth L1 distance between features and the target's states (EAGLE-2 heads only).
    """

    target: Llama
    head: EagleHead
    steps: int
    decay: float = 0.8
    regression: float = 0.1

    @classmethod
    def of(cls, target: Model, head: EagleConfig, *, steps: int, precision: DenseFormat) -> Self:
        """For a dense target and a head that computes in `precision`."""
        return cls(target=target.module.clone(capture=head.capture(target.config.num_layers)), steps=steps,
                   head=EagleHead(head, precision, precision, precision, implementation="reference"))

    def __call__(self, params: Any, target: Params, ids: Int32[Array, "V"] | None, batch: Batch
                 ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and sums over the batch that `summarise` turns into figures.

        Args:
          params: the head's own, f32, as `head_files.initial_parameters` makes them.
          target: the target's.
          ids: target id of each token the head scores; None where it scores all.
          batch: rows.
        """
        tokens, segments, positions, answer = (batch[k] for k in ("tokens", "segments", "positions", "answer"))
        mask = jnp.tri(tokens.shape[1], dtype=bool) & (segments[:, :, None] == segments[:, None, :])
        hidden, states = self._observed(target, tokens, positions, mask)
        variables = self._variables(params, target)
        features = self._features(variables, tokens, states, positions, mask)
        labels = self.target.apply(target, hidden, method="logits").reshape(*tokens.shape, -1)
        hidden = hidden.reshape(*tokens.shape, -1).astype(jnp.float32)
        best = jnp.argmax(labels, axis=-1)
        known = jnp.ones(best.shape, bool)
        if ids is not None:
            labels, known = labels[..., ids], jnp.zeros(self.head.config.vocab_size, bool).at[ids].set(True)[best]
        loss, figures, alive, inside = 0.0, [], jnp.ones_like(known), segments > 0
        for step, feature in enumerate(features):
            # row t predicts the token at t + 2 + step, which the target scores at t + 1 + step
            counted = (_shift(segments, step + 2) == segments) & (segments > 0) & _shift(answer, step + 2)
            seen = _shift(known, step + 1)
            cross_entropy, drafted = _cross_entropy(self, step, variables, feature, labels)
            term = _mean(cross_entropy, counted & seen)
            if self.head.config.version == 2:
                distance = optax.losses.huber_loss(feature.reshape(hidden.shape), _shift(hidden, step + 1)).mean(-1)
                term += self.regression * _mean(distance, counted)
            loss += self.decay**step * term
            drafted = drafted if ids is None else ids[drafted]
            hit = seen & (drafted == _shift(best, step + 1))
            alive, inside = alive & hit, inside & counted
            figures.append(jnp.stack([x.sum() for x in (counted, hit & counted, inside, alive & inside)]))
        return loss, {"counts": jnp.stack(figures).astype(jnp.float32), "loss": loss}

    def _observed(self, target: Params, tokens: Int32[Array, "B S"], positions: Int32[Array, "B S"],
                  mask: Bool[Array, "B S S"]) -> tuple[Float[Array, "M D"], Float[Array, "M F"]]:
        sequences = Sequences.create(self.target.config, positions, mask, self.target.format.dtype, limit=tokens.shape[1])
        hidden, states, _ = self.target.apply(target, tokens.reshape(-1), sequences)
        return jax.lax.stop_gradient((hidden, states))

    def _variables(self, params: Any, target: Params) -> Params:
        """The head's as Flax variables, weights in its dtype, with the tables that it has from the target."""
        narrow = functools.partial(jax.tree.map, lambda leaf: leaf.astype(self.head.format.dtype) if leaf.ndim > 1 else leaf)
        targets = target["params"]
        shared = {"embed": targets["embed"]}
        if self.head.config.tied_head:
            shared["output_table"] = narrow(targets["embed"])
        elif "lm_head" not in params:
            shared["lm_head"] = narrow(targets["lm_head"])
        return {"params": _weights(narrow(params)) | shared}

    def _features(self, variables: Params, tokens: Int32[Array, "B S"], states: Float[Array, "M F"],
                  positions: Int32[Array, "B S"], mask: Bool[Array, "B S S"]) -> list[Float[Array, "M D"]]:
        sequences = Sequences.create(self.head.config.layer, positions, mask, self.head.format.dtype, limit=tokens.shape[1])
        features = []
        for step in range(self.steps):
            states, sequences = self.head.apply(variables, _shift(tokens, step + 1).reshape(-1), states, sequences, step, None,
                                                own=step > 0)
            features.append(states)
        return features


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _cross_entropy(objective: Objective, step: int, variables: Params, feature: Float[Array, "M D"],
                   labels: Float[Array, "B S V"]) -> tuple[Float[Array, "B S"], Int32[Array, "B S"]]:
    """Against the target's distribution, row by row, and the best draft; computed again in the backward pass, since a
    batch's scores over a whole vocabulary are by far its largest arrays."""
    scores = objective.head.apply(variables, feature, method="logits").reshape(labels.shape)
    expected = _shift(jax.nn.softmax(labels, axis=-1), step + 1)
    return -(expected * jax.nn.log_softmax(scores, axis=-1)).sum(-1), jnp.argmax(scores, axis=-1)


def _weights(params: Mapping[str, Any]) -> dict[str, Any]:
    """Each linear weight as the modules hold it."""
    return {name: Dense(part) if name == "w" else _weights(part) if isinstance(part, Mapping) else part
            for name, part in params.items()}


def _shift(x: Array, count: int) -> Array:
    """Row t of the second axis becomes row t + count; zeros come in at the end."""
    return jnp.pad(x[:, count:], [(0, 0), (0, count), *[(0, 0)] * (x.ndim - 2)])


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
