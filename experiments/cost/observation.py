"""One run that tells what every draft tree would have had accepted.

The model decodes plainly while its EAGLE head, behind every token, grows a tree from which nothing is cut. What the head
drafts depends on the text so far alone, not on the rounds that led there, and smaller trees are parts of the large one: of
another depth, its first levels; of another size, the best-scored nodes (`Candidates.prune`). So the accept length of each tree
at each place follows from the candidates seen there and the tokens that came.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import specmq_jax as sm
from experiments.cost.acceptance import Seen
from specmq_jax.decoding.drafters.eagle import EagleState
from specmq_jax.decoding.tree import Accepted, DraftTree


@flax.struct.dataclass
class ObserverState:
    """The head's state, and P places' C candidates in order of drafting.

    Attributes:
      inner: of the drafter that is watched.
      scores: f32[P, C], sums of log-probabilities from the root.
      tokens: i32[P, C].
      parents: i32[P, C], index of each one's parent among the candidates, -1 for the root.
      count: i32 scalar, places seen.
    """

    inner: EagleState
    scores: Float[Array, "P C"]
    tokens: Int32[Array, "P C"]
    parents: Int32[Array, "P C"]
    count: Int32[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Observer:
    """A `specmq_jax.Drafter` that proposes nothing and keeps what another would have chosen from.

    Attributes:
      watched: its tree's depth and top_k bound the trees that can be told of; the size doesn't matter.
      places: tokens of an answer behind which it looks; further ones overwrite the last.
    """

    watched: sm.EagleDrafter
    places: int
    tree_size: int = 1
    max_depth: int = 0

    @property
    def params(self) -> Any:
        return self.watched.params

    @property
    def capture(self) -> tuple[int, ...]:
        return self.watched.capture

    @property
    def scratch_rows(self) -> int:
        return self.watched.scratch_rows

    def check(self, target: sm.LlamaConfig, *, max_len: int | None = None) -> None:
        self.watched.check(target, max_len=max_len)

    def init(self, max_len: int, *, limit: int | None = None) -> ObserverState:
        shape = self.places, self.watched.tree.candidates
        return ObserverState(
            inner=self.watched.init(max_len, limit=limit), scores=jnp.zeros(shape, jnp.float32),
            tokens=jnp.zeros(shape, jnp.int32), parents=jnp.zeros(shape, jnp.int32), count=jnp.int32(0))

    def prefill(self, params: Any, state: ObserverState, tokens: Int32[Array, "M"], next_tokens: Int32[Array, "M"],
                features: Float[Array, "M F"], count: Int32[Array, ""]) -> ObserverState:
        return state.replace(inner=self.watched.prefill(params, state.inner, tokens, next_tokens, features, count))

    def propose(self, params: Any, state: ObserverState, root: Int32[Array, ""]) -> tuple[DraftTree, ObserverState]:
        scores, tree, inner = _all_candidates(self.watched, params, state.inner, root)
        return DraftTree.chain(root[None]), state.replace(
            inner=inner, scores=state.scores.at[state.count].set(scores),
            tokens=state.tokens.at[state.count].set(tree.tokens[1:]),
            parents=state.parents.at[state.count].set(tree.parent[1:] - 1))

    def advance(self, params: Any, state: ObserverState, accepted: Accepted) -> ObserverState:
        return state.replace(inner=self.watched.advance(params, state.inner, accepted), count=state.count + 1)

    def accept_lengths(self, state: ObserverState) -> Int32[np.ndarray, "n"]:
        del state
        return np.zeros(0, np.int32)

    def seen(self, state: ObserverState) -> Seen:
        """What was seen, read on the host."""
        count = int(state.count)
        return Seen(top_k=self.watched.tree.top_k, scores=np.asarray(state.scores)[:count],
                    tokens=np.asarray(state.tokens)[:count], parents=np.asarray(state.parents)[:count])


def _all_candidates(drafter: sm.EagleDrafter, params: Any, state: EagleState, root: Int32[Array, ""]
                    ) -> tuple[Float[Array, "C"], DraftTree, EagleState]:
    """The tree of all candidates, in order of drafting, with their scores."""
    levels = []

    class Scoring(sm.EagleDrafter):
        """Keeps the log-probabilities that a proposal adds up, which the finished tree no longer has."""

        def _best(self, params: Any, features: Float[Array, "M D"]) -> tuple[Float[Array, "M K"], Int32[Array, "M K"]]:
            scores, tokens = super()._best(params, features)
            levels.append(scores.reshape(-1))
            return scores, tokens

    whole = sm.TreeConfig.fitting(drafter.tree.depth, drafter.tree.top_k)
    tree, state = Scoring(drafter.head, whole).propose(params, state, root)
    scores, start = levels[0], drafter.tree.top_k
    for level in levels[1:]:
        above = tree.parent[1 + start:1 + start + level.shape[0]] - 1
        scores, start = jnp.concatenate([scores, level + scores[above]]), start + level.shape[0]
    return scores, tree, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced:
    """A sampling that draws the tokens of a text, whatever the logits: its key holds the text, i32[length]."""

    def __call__(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: Int32[Array, "L"]
                 ) -> Int32[Array, "T"]:
        del logits
        return key[positions]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Watched:
    """An answer and what a head would have drafted for it.

    Attributes:
      prompt: ids; tokens: i32[n], of the answer.
      seen: the candidates behind each token of the answer but the last; None without a head.
    """

    prompt: tuple[int, ...]
    tokens: Int32[np.ndarray, "n"]
    seen: Seen | None


class Watch:
    """Decodes plainly with a model while a head looks on."""

    def __init__(self, model: sm.Model, config: sm.DecodeConfig, head: sm.EagleDrafter | None, places: int) -> None:
        """`config` decides sampling and stop tokens; answers have at most `places` + 1 tokens."""
        self._observer = None if head is None else Observer(head, places)
        self._decoder, self._places = sm.Decoder(model, self._observer, config), places
        self._count = jax.device_put(jnp.int32(places), jax.tree.leaves(model.params)[0].sharding)

    def answer(self, prompt: Sequence[int]) -> Watched:
        """The model's own answer."""
        return self._run(prompt, self._places + 1, None)

    def text(self, prompt: Sequence[int], tokens: Sequence[int]) -> Watched:
        """A given answer; the configuration's sampling must be `Forced`."""
        text = np.zeros(self._decoder.config.max_len + 1, np.int32)
        text[:len(prompt) + len(tokens)] = [*prompt, *tokens]
        return self._run(prompt, len(tokens), jnp.asarray(text))

    def _run(self, prompt: Sequence[int], most: int, key: Array | None) -> Watched:
        state = self._decoder.prefill(prompt, most, key=key)
        state = self._decoder.loop(self._decoder.params, state, self._count)
        tokens = np.asarray(state.tokens)[len(prompt):int(state.length)]
        return Watched(prompt=tuple(prompt), tokens=tokens, seen=self._observer and self._observer.seen(state.drafter))


def greedy_choices(model: sm.Model, prompt: Sequence[int], tokens: Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "m"]:
    """i32[n - 1], the model's best token behind each of a text's tokens but the last."""
    text = np.asarray([*prompt, *tokens], np.int32)
    padded = np.pad(text, (0, -len(text) % 128))  # few lengths, as each is compiled
    best = np.asarray(jnp.argmax(sm.logits(model, padded), axis=-1))
    return best[len(prompt):len(text) - 1].astype(np.int32)
