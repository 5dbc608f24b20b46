"""One draft-verify-accept round of a sequence, and its prompt's way in, as functions of arrays alone.

One verifier serves every temperature. The target draws one token at every node of the draft tree, with noise keyed by the
position alone, and the round walks to the children that carry those tokens. Drafts are always greedy, so the tree is a
function of the past and the committed tokens are exactly those that plain decoding draws with the same seed.
"""

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from specmq_jax import words
from specmq_jax.decoding.config import DecodeConfig
from specmq_jax.decoding.drafters import Drafter
from specmq_jax.decoding.request_sampling import Past, RequestSampling
from specmq_jax.decoding.sampling import Sampler
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.decoding.verification import are_sound, verify
from specmq_jax.errors import UserError
from specmq_jax.loading.model import Model
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache
from specmq_jax.network.llama import Llama
from specmq_jax.network.rows import MOST_DECODE_ROWS

Params = tuple[Any, Any]
"""The target's parameters and the drafter's."""


MOST_AT_ONCE = 64
"""Tokens that a drafter takes in at a time of those that were committed without it."""


class DecodeState(flax.struct.PyTreeNode):
    """Everything one sequence carries from round to round.

    Attributes:
      tokens: i32[capacity], prompt and committed tokens; what stands behind `length` is scratch.
      length: i32 scalar, committed tokens. The newest one, the root of the next draft, is not in the caches yet.
      limit: i32 scalar, the length at which decoding ends.
      done: bool scalar, a stop token, the limit or a fault was reached.
      fault: i32 scalar, the position of the first committed token at which the target's state is not finite, which ends the
        sequence: no token is committed behind it. -1 where all are finite.
      cache: the target's.
      drafter: the drafter's own state.
      lag: i32 scalar, the newest tokens but for the root that the drafter hasn't taken in, for they came without drafts.
      key: of the sampling noise, or what else the sampler takes for one.
      stop_tokens: i32[S], ids that end the sequence.
      accept_lengths: i32[capacity], tokens each round accepted, the bonus token counted, before any cut.
      rounds: i32 scalar, how many rounds that is.
    """

    tokens: Int32[Array, "C"]
    length: Int32[Array, ""]
    limit: Int32[Array, ""]
    done: Bool[Array, ""]
    fault: Int32[Array, ""]
    cache: KVCache
    drafter: Any
    lag: Int32[Array, ""]
    key: Any
    stop_tokens: Int32[Array, "S"]
    accept_lengths: Int32[Array, "C"]
    rounds: Int32[Array, ""]

    def __repr__(self) -> str:
        return (f"DecodeState(length={words.scalar(self.length)}, limit={words.scalar(self.limit)}, "
                f"done={words.scalar(self.done)}, rounds={words.scalar(self.rounds)}, cache={self.cache})")


@dataclasses.dataclass(frozen=True, eq=False)
class Rounds:
    """What a target and a drafter compute of a sequence; `vmap` with `side_by_side.axes` makes it of many.

    Attributes:
      module: the target's.
      drafter: proposes.
      sampling: how the target draws.
    """

    module: Llama
    drafter: Drafter
    sampling: Sampler

    @classmethod
    def of(cls, target: Model, drafter: Drafter, config: DecodeConfig) -> Self:
        """Raises a `UserError` for a drafter that drafts too much to be reproducible, or a model that isn't on a GPU."""
        if config.reproducible and drafter.tree_size > MOST_DECODE_ROWS:
            raise UserError(f"reproducible decoding verifies at most {MOST_DECODE_ROWS} nodes a round, and this "
                            f"drafter's trees have {drafter.tree_size}; choose a smaller tree or a shorter draft")
        if config.reproducible and jax.default_backend() == "gpu":
            target.config.require("reproducible decoding on a GPU", ("rope", "query_scale"))
        # where a last bit can become a whole step of an activation's rounding, plain and speculative decoding would part
        reproducible = config.reproducible or (
            target.module.format.rounds_activations and drafter.tree_size <= MOST_DECODE_ROWS)
        module = target.module.clone(capture=drafter.capture, reproducible=reproducible)
        return cls(module=module, drafter=drafter, sampling=config.sampling)

    def ingest(self, params: Any, cache: KVCache, tokens: Int32[Array, "M"], count: Int32[Array, ""],
               fault: Int32[Array, ""]) -> tuple[Float[Array, "1 D"], Float[Array, "M F"], KVCache, Int32[Array, ""]]:
        """A chunk of a prompt, `count` tokens and padding.

        Returns:
          The state behind the last token, what the drafter reads of every row, the cache, and the fault: the one given, or the
          position of the first token here whose state is not finite.
        """
        hidden, features, cache = side_by_side.apply(self.module, params, tokens, cache)
        broken = ~jnp.all(jnp.isfinite(hidden), axis=1) & (jnp.arange(len(tokens)) < count)
        here = jnp.where(broken.any(), cache.length + jnp.argmax(broken).astype(jnp.int32), -1)
        return hidden[count - 1][None], features, cache.advance(count), jnp.where(fault >= 0, fault, here)

    def logits(self, params: Any, hidden: Float[Array, "1 D"]) -> Float[Array, "1 V"]:
        """The target's f32 scores behind a state."""
        return side_by_side.apply(self.module, params, hidden, method="logits")

    def draw(self, params: Any, hidden: Float[Array, "1 D"], tokens: Int32[Array, "C"], length: Int32[Array, ""], key: Any
             ) -> tuple[Int32[Array, ""], Bool[Array, ""]]:
        """The token drawn behind a state, that of the last of `tokens[:length]`, and whether its scores are finite."""
        logits = self.logits(params, hidden)
        drawn = self._chosen(logits, jnp.asarray(length)[None], key, Past.committed(tokens, length))
        return drawn[0], are_sound(logits, drawn)[0]

    def chosen(self, logits: Float[Array, "T V"], state: DecodeState, tree: DraftTree) -> Int32[Array, "T"]:
        """The token drawn behind each node of a draft."""
        return self._chosen(logits, state.length + tree.depth, state.key, Past.behind(state.tokens, state.length, tree))

    def _chosen(self, logits: Float[Array, "T V"], positions: Int32[Array, "T"], key: Any, past: Past) -> Int32[Array, "T"]:
        if isinstance(self.sampling, RequestSampling):
            return self.sampling(logits, positions, key, past)
        return self.sampling(logits, positions, key)

    def verify(self, params: Any, state: DecodeState, tree: DraftTree) -> tuple[Accepted, KVCache]:
        """See `Decoder.verify`."""
        return verify(self.module, params, state.cache, tree, lambda logits: self.chosen(logits, state, tree))

    def round(self, params: Params, state: DecodeState) -> DecodeState:
        """Propose, verify, accept, advance."""
        root = state.tokens[state.length - 1]
        tree, drafter = self.drafter.propose(params[1], state.drafter, root)
        accepted, cache = self.verify(params[0], state, tree)
        drafter = self.drafter.advance(params[1], drafter, accepted)
        return commit(state, accepted).replace(cache=cache, drafter=drafter)

    def plain_round(self, params: Params, state: DecodeState) -> tuple[DecodeState, Float[Array, "F"]]:
        """A round that drafts nothing: the state, whose drafter lags behind, and what that will read of the root's row."""
        accepted, cache = self.verify(params[0], state, DraftTree.chain(state.tokens[state.length - 1][None]))
        assert accepted.features is not None  # of a verification
        after = commit(state, accepted)
        return after.replace(cache=cache, lag=state.lag + after.length - state.length), accepted.features[0]

    def catch_up(self, params: Params, state: DecodeState, features: Float[Array, "M F"]) -> DecodeState:
        """The drafter takes in the oldest of the rows that it lags behind by, M of them at most, whose features these are."""
        rows, count = lagging(state, features.shape[0]), jnp.minimum(state.lag, features.shape[0])
        drafter = self.drafter.prefill(params[1], state.drafter, state.tokens[rows], state.tokens[rows + 1], features, count)
        return state.replace(drafter=side_by_side.select(count > 0, drafter, state.drafter), lag=state.lag - count)

    def run(self, params: Params, state: DecodeState, most: Int32[Array, ""]) -> DecodeState:
        """Rounds until the sequence is done, `most` of them at most."""
        last = state.rounds + most
        return jax.lax.while_loop(lambda s: ~s.done & (s.rounds < last), lambda s: self.round(params, s), state)


def lagging(state: DecodeState, most: int) -> Int32[Array, "*N M"]:
    """Positions of the oldest rows that the drafter hasn't taken in, `most` of them, and of others behind."""
    return (state.length - 1 - state.lag)[..., None] + jnp.arange(most)


def commit(state: DecodeState, accepted: Accepted) -> DecodeState:
    """Appends the accepted tokens up to the limit, up to and with the first stop token, and up to one whose scores were not
    finite, which is a fault."""
    assert accepted.sound is not None  # of a verification
    slots = jnp.arange(accepted.tokens.shape[0])
    stops = jnp.any(accepted.tokens[:, None] == state.stop_tokens[None, :], axis=1) & (slots < accepted.count)
    count = jnp.where(stops.any(), jnp.argmax(stops) + 1, accepted.count)
    count = jnp.minimum(count, state.limit - state.length).astype(jnp.int32)
    sound = jnp.min(jnp.where(accepted.sound, slots.shape[0], slots)).astype(jnp.int32)
    is_faulty, count = sound < count, jnp.minimum(sound, count)
    length = state.length + count
    return state.replace(
        tokens=jax.lax.dynamic_update_slice(state.tokens, accepted.tokens, (state.length,)), length=length,
        fault=jnp.where(is_faulty, length - 1, -1),
        done=jnp.any(stops & (slots < count)) | (length >= state.limit) | is_faulty,
        accept_lengths=state.accept_lengths.at[state.rounds].set(accepted.count), rounds=state.rounds + 1)
