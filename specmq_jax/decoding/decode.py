"""Prefill, one draft-verify-accept round, and the loops over it.

One verifier serves every temperature. The target draws one token at every node of the draft tree, with noise keyed by the
position alone, and the round walks to the children that carry those tokens. Drafts are always greedy, so the tree is a
function of the past and the committed tokens are exactly those that plain decoding draws with the same seed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from specmq_jax import words
from specmq_jax.decoding.compilation import compiler_options, enable_persistent_cache
from specmq_jax.decoding.config import DecodeConfig
from specmq_jax.decoding.costs import parts, traffic
from specmq_jax.decoding.costs.parts import PhaseTimes
from specmq_jax.decoding.drafters import Drafter, NoDrafter
from specmq_jax.decoding.sampling import seed_key
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.decoding.verification import are_sound, verify
from specmq_jax.errors import NotFiniteError, UserError
from specmq_jax.formats import MOST_REPRODUCIBLE_ROWS
from specmq_jax.loading.memory import check_room, tree_bytes
from specmq_jax.loading.model import Model, check_positions, check_tokens
from specmq_jax.network.cache import KVCache
from specmq_jax.network.llama import Llama

Params = tuple[Any, Any]
"""The target's parameters and the drafter's."""
_SHORT_CALL = 0.025
"""Seconds of a stream's call: behind a shorter one the next has twice as many rounds."""


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
      key: of the sampling noise.
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
    key: Array
    stop_tokens: Int32[Array, "S"]
    accept_lengths: Int32[Array, "C"]
    rounds: Int32[Array, ""]

    def __repr__(self) -> str:
        return (f"DecodeState(length={words.scalar(self.length)}, limit={words.scalar(self.limit)}, "
                f"done={words.scalar(self.done)}, rounds={words.scalar(self.rounds)}, cache={self.cache})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: i32[n], the new tokens; a stop token, if one came, is the last.
      accept_lengths: i32[rounds], tokens each round accepted, the bonus token counted; 1 throughout in plain decoding.
        The last round's is not cut at the stop token or at the limit.
      seconds: of the decode loop alone, which makes all tokens but the first.
      prefill_seconds: of the target's pass over the prompt and the draw of the first token.
      draft_prefill_seconds: of the drafter's pass over the prompt.
      stopped: a stop token ended it, not the limit.
      draft_accept_lengths: i32[n], tokens each inner round of a hierarchical drafter accepted; empty for other drafters.
    """

    tokens: Int32[np.ndarray, "n"]
    accept_lengths: Int32[np.ndarray, "r"]
    seconds: float
    prefill_seconds: float
    draft_prefill_seconds: float
    stopped: bool
    draft_accept_lengths: Int32[np.ndarray, "n"]

    def __repr__(self) -> str:
        return (f"Generation({words.count(len(self.tokens), 'token')} in {words.count(len(self.accept_lengths), 'round')}, "
                f"{self.seconds:.3g} s behind a prefill of {self.prefill_seconds + self.draft_prefill_seconds:.3g} s, "
                f"stopped={self.stopped})")


class Decoder:
    """Decodes one sequence at a time with a target model and a drafter.

    `prefill` and `round` are the jitted functions; `generate` and `stream` run the same rounds in one loop. Attribute
    `prefill_chunks` holds the chunk lengths a prompt is taken in by, ascending.
    """

    def __init__(self, target: Model, drafter: Drafter | None = None, config: DecodeConfig | None = None) -> None:
        """Compiles nothing yet.

        Args:
          target: the model whose output is to be made.
          drafter: none decodes plainly.
          config: lengths, sampling, stop tokens; by default `default_config(target)`.

        Raises:
          UserError: the drafter can't draft for this target, or drafts too much to be reproducible, or the cache is longer than
            the model's positions.
        """
        enable_persistent_cache()
        self.target = target
        self.drafter = drafter if drafter is not None else NoDrafter()
        self.config = config if config is not None else default_config(target)
        check_positions(self.config.max_len, target.config)
        self.drafter.check(target.config, max_len=self.config.max_len)
        if self.config.reproducible and self.drafter.tree_size > MOST_REPRODUCIBLE_ROWS:
            raise UserError(f"reproducible decoding verifies at most {MOST_REPRODUCIBLE_ROWS} nodes a round, and this "
                            f"drafter's trees have {self.drafter.tree_size}; choose a smaller tree or a shorter draft")
        # where a last bit can become a whole step of an activation's rounding, plain and speculative decoding would part
        reproducible = self.config.reproducible or (
            target.module.format.rounds_activations and self.drafter.tree_size <= MOST_REPRODUCIBLE_ROWS)
        self._module = target.module.clone(capture=self.drafter.capture, reproducible=reproducible)
        self.prefill_chunks = prefill_chunks(self.config)
        self._capacity = cache_rows(self.config, self.drafter)
        check_room(self.state_bytes, f"decoding state for {self.config.max_len} tokens")
        (self._device,) = jax.tree.leaves(target.params)[0].devices()
        # counts of rounds that lie on the device, so that starting some moves nothing there
        self._one, self._all = self._placed((jnp.int32(1), jnp.int32(self._capacity)))
        # a cache is two arrays a layer: made one by one they would take longer than a short prompt
        empty = functools.partial(jax.jit, out_shardings=jax.sharding.SingleDeviceSharding(self._device))
        self._empty_cache = empty(lambda: self.target.new_cache(self._capacity, limit=self.config.max_len))
        self._empty_drafter = empty(lambda: self.drafter.init(self._capacity, limit=self.config.max_len))
        self._ingest = jax.jit(self._ingest_chunk, donate_argnums=1)
        self._ingest_drafter = jax.jit(self.drafter.prefill, donate_argnums=1)
        self._score = jax.jit(self._logits_of)
        self._draw = jax.jit(self._draw_after)
        self._run = jax.jit(self._run_rounds, donate_argnums=1, compiler_options=compiler_options())

    def __repr__(self) -> str:
        drafter = "" if isinstance(self.drafter, NoDrafter) else f"{self.drafter!r}, "
        return f"Decoder({self.target!r}, {drafter}max_len={self.config.max_len})"

    @property
    def params(self) -> Params:
        return self.target.params, self.drafter.params

    @property
    def module(self) -> Llama:
        """The target's module as a round applies it."""
        return self._module

    @property
    def loop(self) -> Callable[[Params, DecodeState, Int32[Array, ""]], DecodeState]:
        """The jitted loop that `round`, `generate` and `stream` share: parameters, a state that is consumed, and how many
        rounds at most."""
        return self._run

    @property
    def state_bytes(self) -> int:
        """Bytes of device memory that the caches of one sequence take, the drafter's included."""
        return cache_bytes(self.target, self.drafter, self._capacity)

    def prefill(self, prompt_ids: Sequence[int], max_new_tokens: int | None = None, *, seed: int | None = None,
                key: Any = None) -> DecodeState:
        """Takes in the prompt, draws the first token and returns the state that `round` advances.

        Args:
          prompt_ids: token ids.
          max_new_tokens: where decoding ends; by default, and at most, where the cache is full.
          seed: of the sampling noise, by default the configuration's.
          key: what the configuration's sampling takes as its key, arrays that are consumed; by default
            `sampling.seed_key(seed)`.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, a prompt longer than the cache.
          NotFiniteError: the target's state at a token of the prompt is not finite.
        """
        return self.timed_prefill(prompt_ids, max_new_tokens, seed=seed, key=key)[0]

    def timed_prefill(self, prompt_ids: Sequence[int], max_new_tokens: int | None = None, *, seed: int | None = None,
                      key: Any = None) -> tuple[DecodeState, float, float]:
        """`prefill`, and the seconds that the target's and the drafter's passes over the prompt took."""
        prompt = self._checked(prompt_ids)
        if max_new_tokens is not None:
            _check_count("max_new_tokens", max_new_tokens)
        key = seed_key(self.config.seed if seed is None else seed) if key is None else key
        start = time.perf_counter()
        hidden, cache, chunks, fault = self._ingest_all(prompt)
        first, is_sound = jax.block_until_ready(self._draw(self.target.params, hidden, len(prompt), key))
        middle = time.perf_counter()
        self._check_prompt(prompt, fault, is_sound)
        drafter = self._empty_drafter()
        following = np.append(prompt[1:], int(first)).astype(np.int32)
        for (tokens, count, features), (next_tokens, _) in zip(chunks, self._split(following), strict=True):
            drafter = self._ingest_drafter(self.drafter.params, drafter, tokens, next_tokens, features,
                                           count)
        jax.block_until_ready(drafter)
        end = time.perf_counter()
        room = self.config.max_len - len(prompt)
        limit = len(prompt) + (room if max_new_tokens is None else min(max_new_tokens, room))
        return self._start(prompt, first, limit, cache, drafter, key), middle - start, end - middle

    def round(self, state: DecodeState) -> DecodeState:
        """One round: propose, verify, accept, advance. The state given is consumed; a finished one comes back as is.

        The state's `fault` tells where the target's numbers ended; `generate` and `stream` raise a `NotFiniteError` there.
        """
        return self._run(self.params, state, self._one)

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int | None = None, *, seed: int | None = None
                 ) -> Generation:
        """Prefills and decodes to the end in one jitted loop; arguments and errors as in `prefill`.

        Raises:
          NotFiniteError: also where the target's state at a token of the answer is not finite.
        """
        state, prefill_seconds, draft_prefill_seconds = self.timed_prefill(prompt_ids, max_new_tokens, seed=seed)
        start = time.perf_counter()
        state = jax.block_until_ready(self._run(self.params, state, self._all))
        seconds = time.perf_counter() - start
        length, limit, rounds = int(state.length), int(state.limit), int(state.rounds)
        committed = np.asarray(state.tokens)[:length]
        tokens = committed[len(prompt_ids):]
        self._check_fault(int(state.fault), committed, len(prompt_ids))
        return Generation(tokens=tokens, accept_lengths=np.asarray(state.accept_lengths)[:rounds], seconds=seconds,
                          prefill_seconds=prefill_seconds, draft_prefill_seconds=draft_prefill_seconds,
                          stopped=length < limit or int(tokens[-1]) in self.config.stop_tokens,
                          draft_accept_lengths=self.drafter.accept_lengths(state.drafter))

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int | None = None, *, seed: int | None = None,
               key: Any = None, rounds: int | None = None) -> Iterator[list[int]]:
        """Yields new token ids as they are committed, the same tokens as `generate`, some rounds at a time.

        The first list is the first token, drawn behind the prompt. Other arguments and errors as in `generate`, whose error
        comes behind the tokens before it.

        Args:
          rounds: of a list; by default one at first, and twice as many as long as they take less than 25 ms: to start some
            takes milliseconds of its own.
        """
        if rounds is not None:
            _check_count("rounds", rounds)
        state = self.prefill(prompt_ids, max_new_tokens, seed=seed, key=key)
        sent, count = len(prompt_ids), rounds or 1
        while True:
            tokens, length, done, fault = jax.device_get((state.tokens, state.length, state.done, state.fault))
            if length > sent:
                yield tokens[sent:length].tolist()
            self._check_fault(int(fault), tokens[:length], len(prompt_ids))
            if done:
                return
            sent, start = length, time.perf_counter()
            state = jax.block_until_ready(self._run(self.params, state, self._placed(jnp.int32(count))))
            if rounds is None and time.perf_counter() - start < _SHORT_CALL:
                count *= 2

    def verify(self, params: Any, state: DecodeState, tree: DraftTree) -> tuple[Accepted, KVCache]:
        """A round's verification with the target's parameters: what is accepted of a draft, and the cache that keeps it."""
        return verify(self._module, params, state.cache, tree,
                      lambda logits: self.config.sampling(logits, state.length + tree.depth, state.key))

    def next_logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "V"]:
        """f32 scores of the target for the token behind these, from the same compiled passes as a prefill; errors as there."""
        prompt = self._checked(token_ids)
        hidden, _, _, fault = self._ingest_all(prompt)
        logits = np.asarray(self._score(self.target.params, hidden), np.float32)[0]
        self._check_prompt(prompt, fault, np.isfinite(logits).all())
        return logits

    def bytes_per_round(self, live_length: int, *, inner_rounds: float = 1.0, ahead: float = 0.0) -> int:
        """Bytes one round must read: each weight once for every pass of the target, the draft model or the head that uses it,
        and with each pass the live rows of its cache. Rows written, tables of tokens and activations are not counted.

        Args:
          live_length: tokens in the caches.
          inner_rounds: rounds of a hierarchical drafter's small model in a round; others have none.
          ahead: its passes in a round that go a token ahead.
        """
        return round(traffic.round_bytes(self.target, self.drafter, live_length, inner_rounds, ahead))

    def phase_times(self, prompt_ids: Sequence[int], *, repeats: int = 3) -> PhaseTimes:
        """Measures the parts of a round behind this prompt, apart from `generate`: medians of `repeats` runs.

        Raises:
          UserError: as in `prefill`, or the cache has no room for a round behind the prompt.
        """
        return parts.phase_times(self, prompt_ids, repeats)

    def _checked(self, prompt_ids: Sequence[int]) -> Int32[np.ndarray, "n"]:
        prompt = check_tokens(prompt_ids, self.target.config)
        if len(prompt) >= self.config.max_len:
            raise UserError(f"the prompt has {words.count(len(prompt), 'token')}, the cache holds {self.config.max_len} with "
                            "at least one new token; shorten the prompt or raise max_len")
        return prompt

    def _ingest_all(self, prompt: Int32[np.ndarray, "n"]
                    ) -> tuple[Float[Array, "1 D"], KVCache, list[tuple[Any, ...]], Int32[Array, ""]]:
        """The target's pass over the prompt: its last state, the cache, each chunk's tokens, count and features, and the
        position of the first token whose state is not finite, or -1."""
        cache, chunks, fault = self._empty_cache(), [], self._placed(jnp.int32(-1))
        for tokens, count in self._split(prompt):
            hidden, features, cache, fault = self._ingest(self.target.params, cache, tokens, count, fault)
            chunks.append((tokens, count, features))
        return hidden, cache, chunks, fault

    def _check_prompt(self, prompt: Int32[np.ndarray, "n"], fault: Int32[Array, ""], is_sound: Any) -> None:
        """Raises a `NotFiniteError` for the first token whose state is not finite: `fault`, or the last unless `is_sound`."""
        self._check_fault(int(fault) if int(fault) >= 0 or is_sound else len(prompt) - 1, prompt, len(prompt))

    def _check_fault(self, fault: int, committed: Int32[np.ndarray, "n"], prompt_length: int) -> None:
        if fault < 0:
            return
        place = (f"token {fault + 1} of the prompt" if fault < prompt_length else
                 f"token {fault - prompt_length + 1} of the answer")
        dtype = self.target.module.format.dtype.name
        wider = ", which --precision=bf16 or fp32 may hold" if dtype == "float16" else ""
        raise NotFiniteError(
            f"the model's state at {place} (id {committed[fault]}) is not finite: a weight is not, or activations leave the "
            f"range of {dtype}{wider}", position=fault, tokens=committed[prompt_length:].tolist())

    def _split(self, prompt: Int32[np.ndarray, "n"]) -> Iterator[tuple[Int32[np.ndarray, "M"], np.int32]]:
        """The prompt in padded chunks of the few lengths that are compiled, each with its count of real tokens."""
        while len(prompt):
            size = next((size for size in self.prefill_chunks if size >= len(prompt)), self.prefill_chunks[-1])
            chunk, prompt = prompt[:size], prompt[size:]
            yield np.pad(chunk, (0, size - len(chunk))), np.int32(len(chunk))

    def _start(self, prompt: Int32[np.ndarray, "n"], first: Int32[Array, ""], limit: int, cache: KVCache, drafter: Any,
               key: Array) -> DecodeState:
        stops = np.asarray(self.config.stop_tokens or (-1,), np.int32)
        tokens = np.zeros(self._capacity, np.int32)
        tokens[:len(prompt)], tokens[len(prompt)] = prompt, int(first)
        length = len(prompt) + 1
        small = {"tokens": tokens, "length": np.int32(length), "limit": np.int32(limit),
                 "done": np.bool_(length >= limit or int(first) in self.config.stop_tokens), "fault": np.int32(-1), "key": key,
                 "stop_tokens": stops,
                 "accept_lengths": np.zeros(self._capacity, np.int32), "rounds": np.int32(0)}
        return DecodeState(**self._placed(small), cache=cache, drafter=drafter)

    def _placed(self, tree: Any) -> Any:
        """The same arrays, bound to the target's device as what comes out of a jitted function of its weights is: a function
        given the one and then the other would be compiled twice."""
        return jax.device_put(tree, self._device)

    def _ingest_chunk(self, params: Any, cache: KVCache, tokens: Int32[Array, "M"], count: Int32[Array, ""],
                      fault: Int32[Array, ""]
                      ) -> tuple[Float[Array, "1 D"], Float[Array, "M F"], KVCache, Int32[Array, ""]]:
        """The state behind the last real token, what the drafter reads of every row, the cache, and the fault: the one given,
        or the position of the first real token here whose state is not finite."""
        hidden, features, cache = self._module.apply(params, tokens, cache)
        broken = ~jnp.all(jnp.isfinite(hidden), axis=1) & (jnp.arange(len(tokens)) < count)
        here = jnp.where(broken.any(), cache.length + jnp.argmax(broken).astype(jnp.int32), -1)
        return hidden[count - 1][None], features, cache.advance(count), jnp.where(fault >= 0, fault, here)

    def _logits_of(self, params: Any, hidden: Float[Array, "1 D"]) -> Float[Array, "1 V"]:
        return self._module.apply(params, hidden, method="logits")

    def _draw_after(self, params: Any, hidden: Float[Array, "1 D"], position: Int32[Array, ""], key: Array
                    ) -> tuple[Int32[Array, ""], Bool[Array, ""]]:
        """The token drawn behind a state, and whether its scores are finite."""
        logits = self._logits_of(params, hidden)
        drawn = self.config.sampling(logits, jnp.asarray(position)[None], key)
        return drawn[0], are_sound(logits, drawn)[0]

    def _run_rounds(self, params: Params, state: DecodeState, most: Int32[Array, ""]) -> DecodeState:
        """Rounds until the sequence is done, `most` of them at most."""
        last = state.rounds + most
        return jax.lax.while_loop(lambda s: ~s.done & (s.rounds < last), lambda s: self._round(params, s), state)

    def _round(self, params: Params, state: DecodeState) -> DecodeState:
        root = state.tokens[state.length - 1]
        tree, drafter = self.drafter.propose(params[1], state.drafter, root)
        accepted, cache = self.verify(params[0], state, tree)
        drafter = self.drafter.advance(params[1], drafter, accepted)
        return _commit(state, accepted).replace(cache=cache, drafter=drafter)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1; found {value!r}")


def default_config(target: Model) -> DecodeConfig:
    """`DecodeConfig()`, but for a cache of as many tokens as a model of fewer positions has."""
    default = DecodeConfig()
    if target.config.rope.type == "dynamic":
        return default
    return dataclasses.replace(default, max_len=min(default.max_len, target.config.max_position))


def prefill_chunks(config: DecodeConfig) -> tuple[int, ...]:
    """The chunk lengths that a prompt is taken in by on this device, ascending."""
    return tuple(sorted(config.prefill_chunks or (
        (64, 256) if jax.default_backend() == "cpu" else (128, 512, 2048))))


def cache_rows(config: DecodeConfig, drafter: Drafter) -> int:
    """Rows of each cache: the tokens it is meant for, and room for a draft or a padded chunk behind them."""
    slack = max(drafter.tree_size, drafter.scratch_rows, *prefill_chunks(config))
    return -(-(config.max_len + slack) // 128) * 128


def cache_bytes(target: Model, drafter: Drafter, rows: int) -> int:
    """Bytes of the caches of one sequence, the drafter's state included, with that many rows."""
    return tree_bytes(jax.eval_shape(lambda: (target.new_cache(rows), drafter.init(rows))))


def _commit(state: DecodeState, accepted: Accepted) -> DecodeState:
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
