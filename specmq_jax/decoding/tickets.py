"""Requests to an engine, and what has come of them so far."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
from jaxtyping import Int32

from specmq_jax import entries
from specmq_jax.decoding.config import DecodeConfig
from specmq_jax.decoding.decode import Generation, check_count, check_prompt
from specmq_jax.decoding.request_sampling import MOST_STOP_TOKENS, Needs, RequestKey
from specmq_jax.decoding.sampling import Sampling
from specmq_jax.decoding.slots import MOST_LOGPROBS, Asked
from specmq_jax.errors import UserError
from specmq_jax.loading.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; `limit` counts the prompt, and `needs` is what sampling must do for it. The others are as in
    `Engine.submit`."""

    prompt: Int32[np.ndarray, "n"]
    limit: int
    key: RequestKey
    needs: Needs
    stop_tokens: tuple[int, ...]
    until: Callable[[Sequence[int]], int | None] | None = None
    logprobs: int = 0
    prompt_logprobs: int = 0

    @classmethod
    def of(cls, target: Model, config: DecodeConfig, prompt_ids: Sequence[int], max_new_tokens: int | None, *,
           temperature: float | None, top_k: int | None, top_p: float | None, min_p: float, seed: int | None,
           stop_tokens: Sequence[int] | None, min_tokens: int, logit_bias: Mapping[int, float] | None, presence_penalty: float,
           frequency_penalty: float, repetition_penalty: float, until: Callable[[Sequence[int]], int | None] | None,
           logprobs: int, prompt_logprobs: int) -> Self:
        """Of what `Engine.submit` is given, whose errors these are."""
        prompt = check_prompt(prompt_ids, target, config)
        if max_new_tokens is not None:
            check_count("max_new_tokens", max_new_tokens)
        room = config.max_len - len(prompt)
        default = config.sampling if isinstance(config.sampling, Sampling) else None
        if temperature is None:
            temperature = default.temperature if default else 0.0
        stops = check_stop_tokens(config.stop_tokens if stop_tokens is None else stop_tokens)
        least = entries.integer("a request", "min_tokens", min_tokens, low=0)
        key = RequestKey.of(
            seed=config.seed if seed is None else seed, temperature=temperature,
            top_k=(default.top_k if default else 0) if top_k is None else top_k,
            top_p=(default.top_p if default else 1.0) if top_p is None else top_p, min_p=min_p, logit_bias=logit_bias,
            barred=stops if least else (), bar=min(len(prompt) + least, config.max_len) if least else 0,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty,
            start=len(prompt))
        penalised = presence_penalty != 0 or frequency_penalty != 0 or repetition_penalty != 1
        for token in logit_bias or {}:
            if token >= target.config.vocab_size:
                raise UserError(f"logit_bias names token {token}; the vocabulary has {target.config.vocab_size}")
        return cls(
            prompt=prompt, key=key, stop_tokens=stops,
            needs=Needs.PENALTIES if penalised else Needs(temperature > 0 or bool(logit_bias) or least > 0),
            limit=len(prompt) + (room if max_new_tokens is None else min(max_new_tokens, room)), until=until,
            **{name: entries.integer("a request", name, value, low=0, high=MOST_LOGPROBS)
               for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs))})

    def asked(self, capacity: int) -> Asked:
        """As it is sent to the device, for caches of so many rows."""
        tokens = np.zeros(capacity, np.int32)
        tokens[:len(self.prompt)] = self.prompt
        stops = np.full(MOST_STOP_TOKENS, -1, np.int32)
        stops[:len(self.stop_tokens)] = self.stop_tokens
        return Asked(tokens, np.int32(len(self.prompt)), np.int32(self.limit), self.key, stops)


def check_stop_tokens(stop_tokens: Sequence[int]) -> tuple[int, ...]:
    """They as integers; more than a request may have are a `UserError`."""
    stops = entries.integers("a request", "stop_tokens", stop_tokens)
    if len(stops) > MOST_STOP_TOKENS:
        raise UserError(f"a request has at most {MOST_STOP_TOKENS} stop tokens; found {len(stops)}")
    return stops


class Driver(Protocol):
    """What a ticket asks of the engine."""

    def step(self) -> bool: ...

    def cancel(self, ticket: "Ticket") -> None: ...


class Ticket:
    """A request that was submitted.

    To iterate over it gives lists of new tokens as they are committed; `result` waits for all. Both drive the engine.

    Attributes:
      request: what was asked for.
      tokens: committed so far; coming: how many, at least, those calls will bring which have been started.
      generation, error: how it has ended, None before.
      is_cancelled: it was.
      rounds: that have committed them.
      times: when it was submitted, given a slot, and told the first token, in seconds of `time.perf_counter`.
      slot: where it is decoded, -1 before; reused: tokens of its prompt that the slot still held; taken: those that the slot
        holds by now.
    """

    def __init__(self, engine: Driver, request: Request) -> None:
        self._engine, self.request = engine, request
        self.tokens: list[int] = []
        self.generation: Generation | None = None
        self.error: Exception | None = None
        self.is_cancelled = False
        self.times = [time.perf_counter()]
        self.slot, self.reused, self.taken = -1, 0, 0
        self.coming, self.rounds = 0, 0

    def __repr__(self) -> str:
        state = ("failed" if self.error else "done" if self.generation else "cancelled" if self.is_cancelled else
                 "waiting" if self.slot < 0 else "running")
        return f"Ticket({len(self.request.prompt)} + {len(self.tokens)} tokens, {state})"

    @property
    def count(self) -> int:
        """New tokens so far."""
        return len(self.tokens)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.generation is not None or self.error is not None or self.is_cancelled

    def __iter__(self) -> Iterator[list[int]]:
        sent = 0
        while True:
            done = self.is_done
            if len(self.tokens) > sent:
                fresh = self.tokens[sent:]
                sent += len(fresh)
                yield fresh
            elif done:
                if self.error:
                    raise self.error
                return
            else:
                self._engine.step()

    def result(self) -> Generation:
        """Everything that was decoded; what `seconds` count is shared with the other requests of that time.

        Raises:
          NotFiniteError: as `Decoder.generate`.
          UserError: the request was cancelled, or the engine closed.
        """
        for _ in self:
            pass
        if self.generation is None:
            raise UserError("the request was cancelled")
        return self.generation

    def cancel(self) -> None:
        """Ends it where it stands; its slot is free behind the call that runs. What is done already stays done."""
        self._engine.cancel(self)


def shared_tokens(held: Int32[np.ndarray, "m"], prompt: Int32[np.ndarray, "n"]) -> int:
    """How many tokens both begin with."""
    length = min(len(held), len(prompt))
    if not length or held[0] != prompt[0]:
        return 0
    differing = np.flatnonzero(held[:length] != prompt[:length])
    return int(differing[0]) if len(differing) else length


def rounds_until(count: int, accept_lengths: Int32[np.ndarray, "r"]) -> int:
    """The rounds, one at least, that committed so many tokens; the first token comes before all rounds."""
    return max(1, 1 + int(np.searchsorted(1 + np.cumsum(accept_lengths), count)))
