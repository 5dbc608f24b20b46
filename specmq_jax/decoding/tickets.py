"""Requests to an engine, and what has come of them so far."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from specmq_jax.decoding.decode import Generation
from specmq_jax.decoding.request_sampling import Needs, RequestKey
from specmq_jax.errors import UserError


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
        self.coming = 0

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


def rounds_until(count: int, accept_lengths: Int32[np.ndarray, "r"]) -> int:
    """The rounds, one at least, that committed so many tokens; the first token comes before all rounds."""
    return max(1, 1 + int(np.searchsorted(1 + np.cumsum(accept_lengths), count)))
