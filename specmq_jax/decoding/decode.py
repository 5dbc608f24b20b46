"""Decoding one sequence: its prompt, its rounds, and what comes of them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from specmq_jax import words
from specmq_jax.decoding.compilation import compiler_options, enable_persistent_cache
from specmq_jax.decoding.config import DecodeConfig
from specmq_jax.decoding.costs import parts, traffic
from specmq_jax.decoding.costs.parts import PhaseTimes
from specmq_jax.decoding.drafters import Drafter, NoDrafter
from specmq_jax.decoding.rounds import MOST_AT_ONCE, DecodeState, Params, Rounds
from specmq_jax.decoding.sampling import seed_key
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.errors import NotFiniteError, UserError
from specmq_jax.loading.memory import check_room, tree_bytes
from specmq_jax.loading.model import Model, check_positions, check_tokens
from specmq_jax.network.cache import KVCache
from specmq_jax.network.llama import Llama

_SHORT_CALL = 0.025
"""Seconds of a stream's call: behind a shorter one the next has twice as many rounds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """The target's log-probabilities of tokens, before anything that a request's sampling makes of them.

    Attributes:
      tokens: f32[n], of the tokens themselves.
      best: i32[n, k], the k likeliest in their places, likeliest first; best_logprobs: f32[n, k], theirs.
    """

    tokens: Float[np.ndarray, "n"]
    best: Int32[np.ndarray, "n k"]
    best_logprobs: Float[np.ndarray, "n k"]


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
      logprobs: of the new tokens; prompt_logprobs: of the prompt's but the first. None where they were not asked for.
    """

    tokens: Int32[np.ndarray, "n"]
    accept_lengths: Int32[np.ndarray, "r"]
    seconds: float
    prefill_seconds: float
    draft_prefill_seconds: float
    stopped: bool
    draft_accept_lengths: Int32[np.ndarray, "n"]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None

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
        self.rounds = Rounds.of(target, self.drafter, self.config)
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
        self._ingest = jax.jit(self.rounds.ingest, donate_argnums=1)
        self._ingest_drafter = jax.jit(self.drafter.prefill, donate_argnums=1)
        self._score = jax.jit(self.rounds.logits)
        self._draw = jax.jit(self.rounds.draw)
        self._run = jax.jit(self.rounds.run, donate_argnums=1, compiler_options=compiler_options())

    def __repr__(self) -> str:
        drafter = "" if isinstance(self.drafter, NoDrafter) else f"{self.drafter!r}, "
        return f"Decoder({self.target!r}, {drafter}max_len={self.config.max_len})"

    @property
    def params(self) -> Params:
        return self.target.params, self.drafter.params

    @property
    def module(self) -> Llama:
        """The target's module as a round applies it."""
        return self.rounds.module

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
            check_count("max_new_tokens", max_new_tokens)
        key = seed_key(self.config.seed if seed is None else seed) if key is None else key
        start = time.perf_counter()
        hidden, cache, chunks, fault = self._ingest_all(prompt)
        first, is_sound = jax.block_until_ready(self._draw(
            self.target.params, hidden, self._tokens(prompt), len(prompt), key))
        middle = time.perf_counter()
        self._check_prompt(prompt, fault, is_sound)
        drafter = self._empty_drafter()
        following = np.append(prompt[1:], int(first)).astype(np.int32)
        for (tokens, count, features), (next_tokens, _) in zip(
                chunks, split_prompt(following, self.prefill_chunks), strict=True):
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
            check_count("rounds", rounds)
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
        return self.rounds.verify(params, state, tree)

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
        return check_prompt(prompt_ids, self.target, self.config)

    def _ingest_all(self, prompt: Int32[np.ndarray, "n"]
                    ) -> tuple[Float[Array, "1 D"], KVCache, list[tuple[Any, ...]], Int32[Array, ""]]:
        """The target's pass over the prompt: its last state, the cache, each chunk's tokens, count and features, and the
        position of the first token whose state is not finite, or -1."""
        cache, chunks, fault = self._empty_cache(), [], self._placed(jnp.int32(-1))
        for tokens, count in split_prompt(prompt, self.prefill_chunks):
            hidden, features, cache, fault = self._ingest(self.target.params, cache, tokens, count, fault)
            chunks.append((tokens, count, features))
        return hidden, cache, chunks, fault

    def _check_prompt(self, prompt: Int32[np.ndarray, "n"], fault: Int32[Array, ""], is_sound: Any) -> None:
        """Raises a `NotFiniteError` for the first token whose state is not finite: `fault`, or the last unless `is_sound`."""
        self._check_fault(int(fault) if int(fault) >= 0 or is_sound else len(prompt) - 1, prompt, len(prompt))

    def _check_fault(self, fault: int, committed: Int32[np.ndarray, "n"], prompt_length: int) -> None:
        if fault >= 0:
            raise not_finite(self.target, fault, committed, prompt_length)

    def _start(self, prompt: Int32[np.ndarray, "n"], first: Int32[Array, ""], limit: int, cache: KVCache, drafter: Any,
               key: Array) -> DecodeState:
        stops = np.asarray(self.config.stop_tokens or (-1,), np.int32)
        length = len(prompt) + 1
        small = {"tokens": self._tokens([*prompt, int(first)]), "length": np.int32(length), "limit": np.int32(limit),
                 "done": np.bool_(length >= limit or int(first) in self.config.stop_tokens), "fault": np.int32(-1),
                 "lag": np.int32(0), "key": key,
                 "stop_tokens": stops,
                 "accept_lengths": np.zeros(self._capacity, np.int32), "rounds": np.int32(0)}
        return DecodeState(**self._placed(small), cache=cache, drafter=drafter)

    def _tokens(self, committed: Sequence[int] | Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "C"]:
        tokens = np.zeros(self._capacity, np.int32)
        tokens[:len(committed)] = committed
        return tokens

    def _placed(self, tree: Any) -> Any:
        """The same arrays, bound to the target's device as what comes out of a jitted function of its weights is: a function
        given the one and then the other would be compiled twice."""
        return jax.device_put(tree, self._device)


def check_prompt(prompt_ids: Sequence[int], target: Model, config: DecodeConfig) -> Int32[np.ndarray, "n"]:
    """The prompt; an empty one, an id outside the vocabulary and one that is longer than the cache are `UserError`s."""
    prompt = check_tokens(prompt_ids, target.config)
    if len(prompt) >= config.max_len:
        raise UserError(f"the prompt has {words.count(len(prompt), 'token')}, the cache holds {config.max_len} with "
                        "at least one new token; shorten the prompt or raise max_len")
    return prompt


def check_count(name: str, value: Any) -> None:
    """Anything but a whole number of at least 1 is a `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1; found {value!r}")


def default_config(target: Model) -> DecodeConfig:
    """`DecodeConfig()`, but for a cache of as many tokens as a model of fewer positions has."""
    default = DecodeConfig()
    if target.config.rope.type == "dynamic":
        return default
    return dataclasses.replace(default, max_len=min(default.max_len, target.config.max_position))


def prefill_chunks(config: DecodeConfig) -> tuple[int, ...]:
    """The chunk lengths that a prompt is taken in by on this device, ascending; none that a cache is too short to fill."""
    if config.prefill_chunks:
        return tuple(sorted(config.prefill_chunks))
    smallest, *others = (64, 256) if jax.default_backend() == "cpu" else (64, 128, 512, 2048)
    return smallest, *(size for size in others if size <= config.max_len)


def cache_rows(config: DecodeConfig, drafter: Drafter) -> int:
    """Rows of each cache: the tokens it is meant for, and room for a draft or a padded chunk behind them."""
    slack = max(drafter.tree_size, drafter.scratch_rows, MOST_AT_ONCE, *prefill_chunks(config))
    return -(-(config.max_len + slack) // 128) * 128


def cache_bytes(target: Model, drafter: Drafter, rows: int) -> int:
    """Bytes of the caches of one sequence, the drafter's state included, with that many rows."""
    return tree_bytes(jax.eval_shape(lambda: (target.new_cache(rows), drafter.init(rows))))


def split_prompt(prompt: Int32[np.ndarray, "n"], chunks: Sequence[int]) -> Iterator[tuple[Int32[np.ndarray, "M"], np.int32]]:
    """The prompt in padded chunks of the few lengths that are compiled, ascending; each with its count of real tokens."""
    while len(prompt):
        size = next((size for size in chunks if size >= len(prompt)), chunks[-1])
        chunk, prompt = prompt[:size], prompt[size:]
        yield np.pad(chunk, (0, size - len(chunk))), np.int32(len(chunk))


def not_finite(target: Model, fault: int, committed: Int32[np.ndarray, "n"], prompt_length: int) -> NotFiniteError:
    """The error of a state that is not finite at position `fault` of what has been committed, the prompt included."""
    place = (f"token {fault + 1} of the prompt" if fault < prompt_length else
             f"token {fault - prompt_length + 1} of the answer")
    dtype = target.module.format.dtype.name
    wider = ", which --precision=bf16 or fp32 may hold" if dtype == "float16" else ""
    return NotFiniteError(
        f"the model's state at {place} (id {committed[fault]}) is not finite: a weight is not, or activations leave the "
        f"range of {dtype}{wider}", position=fault, tokens=committed[prompt_length:].tolist())
