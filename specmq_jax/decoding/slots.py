"""What an engine computes: the state of many sequences, a chunk of a prompt into one of them, rounds of some of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.top_k.api import log_softmax_top_k
from specmq_jax.decoding.drafters import ChainDrafter, Drafter, HierarchicalDrafter, NoDrafter
from specmq_jax.decoding.request_sampling import MOST_STOP_TOKENS, Needs, RequestKey
from specmq_jax.decoding.rounds import MOST_AT_ONCE, DecodeState, Params, Rounds, lagging
from specmq_jax.loading.model import Model
from specmq_jax.network import side_by_side
from specmq_jax.network.cache import KVCache

ROUNDS = 8
"""Rounds of a call: what ends within one, or comes, waits for its end. The number is fixed, for then a GPU needs nothing of the
host before the last of them, and the host starts the next call meanwhile."""

MOST_LAG = 1024
"""Tokens that a sequence's drafter may lag behind by."""

MOST_LOGPROBS = 20
"""Of the likeliest tokens in a place, as many as OpenAI's clients may ask for."""

Scores = tuple[Float[Array, "M"], Int32[Array, "M k"], Float[Array, "M k"]]
"""Of tokens, and of the likeliest in their places, by id."""


class Chunk(flax.struct.PyTreeNode):
    """Tokens of a prompt from `start` on, `count` of them and padding, and the token behind each. The first chunk `begins`: of
    what the slot held before, only rows below `start` are left."""

    tokens: Int32[Any, "M"]
    following: Int32[Any, "M"]
    count: Int32[Any, ""]
    start: Int32[Any, ""]
    begins: Bool[Any, ""]

    @classmethod
    def of(cls, prompt: Int32[np.ndarray, "n"], start: int, size: int, *, begins: bool) -> Self:
        """With room for `size` tokens."""
        tokens, following = prompt[start:start + size], prompt[start + 1:start + 1 + size]
        return cls(np.pad(tokens, (0, size - len(tokens))), np.pad(following, (0, size - len(following))),
                   np.int32(len(tokens)), np.int32(start), np.bool_(begins))


class Asked(flax.struct.PyTreeNode):
    """A request on the device: its prompt of `count` tokens, and what `DecodeState` holds of the rest."""

    tokens: Int32[Any, "C"]
    count: Int32[Any, ""]
    limit: Int32[Any, ""]
    key: RequestKey
    stop_tokens: Int32[Any, "K"]


class Report(flax.struct.PyTreeNode):
    """What a call leaves for the host to read, of each of its N slots.

    Attributes:
      length, rounds, fault: i32[N]; done: bool[N], as in `DecodeState`.
      fresh: i32[N, W], the tokens that were committed, and padding.
      accept_lengths: i32[N, C].
    """

    length: Int32[Array, "N"]
    rounds: Int32[Array, "N"]
    fault: Int32[Array, "N"]
    done: Bool[Array, "N"]
    fresh: Int32[Array, "N W"]
    accept_lengths: Int32[Array, "N C"]


class First(flax.struct.PyTreeNode):
    """What taking in prompts leaves of each: the token drawn behind it, and what `DecodeState` says of it."""

    token: Int32[Array, "*N"]
    fault: Int32[Array, "*N"]
    done: Bool[Array, "*N"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Slots:
    """Functions of the state of `count` sequences, each of at most `limit` tokens in caches of `capacity` rows; `choices` are
    the drafters that share their state, the rounds' own one first."""

    target: Model
    rounds: Rounds
    choices: tuple[Drafter, ...]
    count: int
    limit: int
    capacity: int

    def empty(self) -> DecodeState:
        """The state of slots that hold nothing; what runs in them is done."""
        one = DecodeState(
            tokens=jnp.zeros(self.capacity, jnp.int32), length=jnp.int32(1), limit=jnp.int32(0), done=jnp.asarray(True),
            fault=jnp.int32(-1), cache=self.target.new_cache(self.capacity, limit=self.limit),
            drafter=self._empty_drafter(), lag=jnp.int32(0), key=RequestKey.of(seed=0),
            stop_tokens=jnp.full(MOST_STOP_TOKENS, -1, jnp.int32),
            accept_lengths=jnp.zeros(self.capacity, jnp.int32), rounds=jnp.int32(0))
        return side_by_side.in_slots(one, self.count)

    def _empty_drafter(self) -> Any:
        return self.rounds.drafter.init(self.capacity, limit=self.limit)

    def leaves_behind(self, choice: int) -> bool:
        """Whether calls of that choice draft nothing for a drafter that will have to be told."""
        return choice > 0 and isinstance(self.choices[choice], NoDrafter)

    def empty_features(self) -> Float[Array, "B W F"]:
        """Room for what drafters will read of W rows that they may lag behind by, by the rows' positions modulo W, in the
        target's dtype; of none where all calls draft, and with nothing in them for drafters that read tokens alone."""
        def ingested(params: Any) -> Any:
            cache = self.target.new_cache(self.capacity, limit=self.limit)
            return self.rounds.ingest(params, cache, jnp.zeros(1, jnp.int32), jnp.int32(1), jnp.int32(-1))[1]

        reads_tokens = isinstance(self.rounds.drafter, ChainDrafter | HierarchicalDrafter)
        width = 0 if reads_tokens else jax.eval_shape(ingested, self.target.params).shape[1]
        return jnp.zeros((self.count, self.most_lag, width), self.target.module.format.dtype)

    @property
    def most_lag(self) -> int:
        """W."""
        return min(MOST_LAG, self.capacity) if len(self.choices) > 1 else 0

    def scores(self, params: Params, state: DecodeState, slot: Int32[Array, ""], chunk: Chunk) -> tuple[DecodeState, Scores]:
        """Log-probabilities of the tokens behind those of a chunk, whose rows are computed again."""
        part = side_by_side.take(state, slot)
        hidden, _, cache = side_by_side.apply(self.rounds.module, params[0], chunk.tokens, part.cache.rewind(chunk.start))
        logits = self.rounds.logits(params[0], hidden).astype(jnp.float32)
        best_logprobs, best = log_softmax_top_k(logits, min(MOST_LOGPROBS, logits.shape[1]))
        own = jnp.take_along_axis(logits, chunk.following[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        part = part.replace(cache=part.cache.replace(layers=cache.layers))
        return side_by_side.put(state, part, slot), (own, best, best_logprobs)

    def ingest(self, params: Params, state: DecodeState, slot: Int32[Array, ""], chunk: Chunk) -> DecodeState:
        """A chunk of a prompt that is not its last."""
        part = side_by_side.take(state, slot)
        _, features, cache, fault, drafter = self._pass(params, part, chunk)
        drafter = self.rounds.drafter.prefill(params[1], drafter, chunk.tokens, chunk.following, features, chunk.count)
        return side_by_side.put(state, part.replace(
            done=jnp.asarray(True), fault=fault, cache=cache, drafter=drafter, lag=jnp.int32(0)), slot)

    def ingest_last(self, params: Params, state: DecodeState, slots: Int32[Array, "N"], chunks: Chunk, asked: Asked,
                    needs: Needs) -> tuple[DecodeState, First]:
        """The last chunks of N prompts, of one length, their first tokens, and the sequences' state; `needs` as in `run`."""
        rounds = self._rounds(needs)
        if len(slots) == 1:
            [slot] = slots
            chunk, one = jax.tree.map(lambda leaf: leaf[0], (chunks, asked))
            part, first = self._admitted(rounds, params, side_by_side.take(state, slot), chunk, one)
            return side_by_side.put(state, part, slot), jax.tree.map(lambda leaf: leaf[None], first)
        before = side_by_side.take(state, slots)
        each = side_by_side.axes(before)
        admitted = functools.partial(self._admitted, rounds, params)
        after, first = jax.vmap(admitted, in_axes=(each, 0, 0), out_axes=(each, 0))(before, chunks, asked)
        return side_by_side.put(state, after, slots), first

    def _admitted(self, rounds: Rounds, params: Params, part: DecodeState, chunk: Chunk, asked: Asked
                  ) -> tuple[DecodeState, First]:
        hidden, features, cache, fault, drafter = self._pass(params, part, chunk)
        first, is_sound = rounds.draw(params[0], hidden, asked.tokens, asked.count, asked.key)
        following = chunk.following.at[chunk.count - 1].set(first)
        drafter = self.rounds.drafter.prefill(params[1], drafter, chunk.tokens, following, features, chunk.count)
        fault = jnp.where((fault < 0) & ~is_sound, asked.count - 1, fault)
        length = asked.count + 1
        done = (length >= asked.limit) | jnp.any(first == asked.stop_tokens) | (fault >= 0)
        return DecodeState(
            tokens=asked.tokens.at[asked.count].set(first), length=length, limit=asked.limit, done=done, fault=fault,
            cache=cache, drafter=drafter, lag=jnp.int32(0), key=asked.key, stop_tokens=asked.stop_tokens,
            accept_lengths=jnp.zeros(self.capacity, jnp.int32), rounds=jnp.int32(0)), First(token=first, fault=fault, done=done)

    def _pass(self, params: Params, part: DecodeState, chunk: Chunk) -> tuple[Any, ...]:
        """The target's pass over a chunk, and the drafter's state in which it goes on."""
        fault = jnp.where(chunk.begins, -1, part.fault)
        passed = self.rounds.ingest(params[0], part.cache.rewind(chunk.start), chunk.tokens, chunk.count, fault)
        return *passed, side_by_side.emptied(part.drafter, self._empty_drafter(), chunk.begins, chunk.start)

    def filled(self, state: DecodeState, length: Int32[Array, ""]) -> DecodeState:
        """The state with so many rows in every cache, whatever they hold, for what a call takes to depend on."""
        def one(part: Any) -> Any:
            return part.rewind(jnp.full_like(part.length, length)) if isinstance(part, KVCache) else part

        return jax.tree.map(one, state, is_leaf=lambda part: isinstance(part, KVCache))

    def run(self, params: Params, state: DecodeState, features: Float[Array, "B W F"], slots: Int32[Array, "N"], needs: Needs,
            choice: int) -> tuple[DecodeState, Float[Array, "B W F"], Report]:
        """`ROUNDS` rounds of some slots; those that are done stay as they are.

        None of them `needs` more of sampling, and nothing more is done for any. The drafter is one of `choices`, none of which
        may lag behind; where it is none they all do then, and `features` hold what they are to read.
        """
        drafter, rounds = self.choices[choice], self._rounds(needs)
        rounds, is_plain = dataclasses.replace(rounds, drafter=drafter), self.leaves_behind(choice)

        def turn(part: DecodeState) -> tuple[DecodeState, Float[Array, "F"] | None]:
            after, read = rounds.plain_round(params, part) if is_plain else (rounds.round(params, part), None)
            return side_by_side.select(~part.done, after, part), read

        before = side_by_side.take(state, slots)
        if len(slots) == 1:
            after, read = _repeated(turn, side_by_side.take(state, slots[0]))
            state, read = side_by_side.put(state, after, slots[0]), jax.tree.map(lambda rows: rows[:, None], read)
        else:
            each = side_by_side.axes(before)
            after, read = _repeated(jax.vmap(turn, in_axes=(each,), out_axes=(each, 0)), before)
            state = side_by_side.put(state, after, slots)
        after = side_by_side.take(state, slots)
        if read is not None:
            features = self._kept(features, slots, jnp.swapaxes(read, 0, 1), before.length, after.length)
        window = min(self.capacity, ROUNDS * (drafter.max_depth + 1))
        places = jnp.minimum(before.length[:, None] + jnp.arange(window), self.capacity - 1)
        fresh = jnp.take_along_axis(after.tokens, places, axis=1)
        return state, features, Report(length=after.length, rounds=after.rounds, fault=after.fault, done=after.done,
                                       fresh=fresh, accept_lengths=after.accept_lengths)

    def _kept(self, features: Float[Array, "B W F"], slots: Int32[Array, "N"], read: Float[Array, "N R F"],
              start: Int32[Array, "N"], end: Int32[Array, "N"]) -> Float[Array, "B W F"]:
        """The features with those that rounds have read, in which each length went from `start` to `end`."""
        rows = start[:, None] - 1 + jnp.arange(ROUNDS)
        places = jnp.where(rows < end[:, None] - 1, rows % self.most_lag, self.most_lag)
        read = read[..., :features.shape[2]].astype(features.dtype)
        return features.at[slots[:, None], places].set(read, mode="drop")

    def catch_up(self, params: Params, state: DecodeState, features: Float[Array, "B W F"], slots: Int32[Array, "N"]
                 ) -> DecodeState:
        """The drafters of some slots take in all that they lag behind by."""
        part, most = side_by_side.take(state, slots), max(ROUNDS, MOST_AT_ONCE // len(slots))
        each = side_by_side.axes(part)
        take_in = jax.vmap(functools.partial(self.rounds.catch_up, params), in_axes=(each, 0), out_axes=each)

        def turn(part: DecodeState) -> DecodeState:
            return take_in(part, features[slots[:, None], lagging(part, most) % self.most_lag])

        return side_by_side.put(state, jax.lax.while_loop(lambda part: (part.lag > 0).any(), turn, part), slots)

    def _rounds(self, needs: Needs) -> Rounds:
        return dataclasses.replace(self.rounds, sampling=needs.sampler)


def _repeated(turn: Callable[[DecodeState], tuple[DecodeState, Any]], part: DecodeState) -> tuple[DecodeState, Any]:
    """`ROUNDS` turns: the state behind them, and what each gives beside."""
    return jax.lax.scan(lambda part, _: turn(part), part, length=ROUNDS)
