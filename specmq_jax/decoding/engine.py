"""Decoding many sequences in one loop."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Int32

from specmq_jax import entries
from specmq_jax.decoding import budget as budgets
from specmq_jax.decoding.budget import Budget
from specmq_jax.decoding.compilation import compiler_options, enable_persistent_cache
from specmq_jax.decoding.config import DecodeConfig
from specmq_jax.decoding.decode import (
    Generation,
    Logprobs,
    cache_bytes,
    cache_rows,
    default_config,
    not_finite,
    prefill_chunks,
)
from specmq_jax.decoding.drafters import Drafter, HierarchicalDrafter, NoDrafter
from specmq_jax.decoding.request_sampling import Needs, RequestKey, RequestSampling
from specmq_jax.decoding.rounds import Params, Rounds
from specmq_jax.decoding.sampling import Greedy, Sampling
from specmq_jax.decoding.slots import ROUNDS, Chunk, First, Report, Slots
from specmq_jax.decoding.tickets import Request, Ticket, check_stop_tokens, rounds_until, shared_tokens
from specmq_jax.errors import UserError
from specmq_jax.formats import MOST_REPRODUCIBLE_ROWS
from specmq_jax.loading.memory import check_room, tree_bytes
from specmq_jax.loading.model import Model, check_positions
from specmq_jax.network import side_by_side

_TOGETHER = 512
"""Rows of a pass over several prompts."""

_MOST_THREADS = 16
"""Functions that are compiled at a time; each needs some memory of the host."""


class Engine:
    """Decodes up to `slots` sequences at once with a target model and a drafter.

    Requests wait for a free slot in the order of their coming. Each gives the tokens that `Decoder` gives it alone, whatever
    else is decoded, up to numerical ties; with `reproducible` to the bit. Nothing happens in the background: iterating over
    tickets, waiting for results and `step` drive all requests. All methods may be called from any thread. Attribute `admitted`
    counts the requests that have been given a slot, `active` those of the newest call, `waited` the seconds that the host has
    waited for the device, `reused` the tokens of prompts that a slot still held.

    A request whose prompt begins like what a free slot holds, as the next turn of a chat does, goes on behind that, but not
    with `reproducible`: rows that were decoded have other last bits than those of a prompt.

    Behind `warm_up` each call drafts as much as pays: the drafter's whole trees, smaller ones, or nothing, whichever is
    expected to commit most tokens a second of so many sequences. `warm_up` measures what their rounds take, and the requests'
    accept lengths tell what they commit. While nothing is drafted, what the drafter would have read is kept, and it takes that
    in before it drafts again. The tokens don't depend on it. Attribute `calls` counts the calls by the nodes of their trees, 1
    where nothing is drafted.
    """

    def __init__(self, target: Model, drafter: Drafter | None = None, config: DecodeConfig | None = None, *,
                 slots: int = 8, budget: bool = True) -> None:
        """Compiles nothing yet.

        Args:
          target, drafter, config: as for `Decoder`; sampling and stop tokens are what a request has that doesn't say.
          slots: sequences at once.
          budget: whether calls draft as much as pays; without it each drafts the drafter's whole trees.

        Raises:
          UserError: as `Decoder`, a sampler that is neither `Greedy` nor `Sampling`, a number of slots that is none, or too
            little memory for them.
        """
        enable_persistent_cache()
        self.target, self.drafter = target, drafter if drafter is not None else NoDrafter()
        self.config = config if config is not None else default_config(target)
        self.slots = entries.integer("Engine", "slots", slots, low=1)
        entries.flag("Engine", "budget", budget)
        if not isinstance(self.config.sampling, Greedy | Sampling):
            raise UserError(f"an engine's requests are sampled by Greedy() or Sampling(...); found {self.config.sampling!r}")
        check_positions(self.config.max_len, target.config)
        self.drafter.check(target.config, max_len=self.config.max_len)
        rows = slots * self.drafter.tree_size
        if self.config.reproducible and rows > MOST_REPRODUCIBLE_ROWS:
            raise UserError(f"reproducible decoding verifies at most {MOST_REPRODUCIBLE_ROWS} rows at once; {slots} slots of "
                            f"{self.drafter.tree_size} nodes are {rows}")
        check_stop_tokens(self.config.stop_tokens)
        self._capacity = cache_rows(self.config, self.drafter)
        self._choices = self._make_choices() if budget else (self.drafter,)
        self._budget = Budget([drafter.max_depth for drafter in self._choices])
        self._slots = Slots(target=target, rounds=self._make_rounds(), choices=self._choices, count=slots,
                            limit=self.config.max_len, capacity=self._capacity)
        self._chunks = prefill_chunks(self.config)
        check_room(slots * cache_bytes(target, self.drafter, self._capacity) +
                   tree_bytes(jax.eval_shape(self._slots.empty_features)), f"{slots} slots of {self.config.max_len} tokens")
        (self._device,) = jax.tree.leaves(target.params)[0].devices()
        placed = functools.partial(jax.jit, out_shardings=jax.sharding.SingleDeviceSharding(self._device))
        self._state, self._features = placed(self._slots.empty)(), placed(self._slots.empty_features)()
        compiled = functools.partial(jax.jit, donate_argnums=1, compiler_options=compiler_options())
        self._run = compiled(self._slots.run, donate_argnums=(1, 2), static_argnums=(4, 5))
        self._catch_up = compiled(self._slots.catch_up)
        self._filled = jax.jit(self._slots.filled, donate_argnums=0)
        self._scores = compiled(self._slots.scores)
        self._take_in, self._admit = compiled(self._slots.ingest), compiled(self._slots.ingest_last, static_argnums=5)
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Ticket] = {}
        self._entering: Ticket | None = None
        self._pending: list[tuple[list[Ticket | None], int, Any]] = []
        self._free = list(range(slots))
        self._holders: list[Ticket | None] = [None] * slots
        self._held, self._lags = [np.zeros(0, np.int32)] * slots, np.zeros(slots, np.int32)
        self._arrivals, self._driving, self._is_closed = threading.Lock(), threading.RLock(), False
        self.admitted, self.active, self.reused, self.waited = 0, 0, 0, 0.0
        self.calls: collections.Counter[int] = collections.Counter()

    def __repr__(self) -> str:
        drafter = "" if isinstance(self.drafter, NoDrafter) else f"{self.drafter!r}, "
        return f"Engine({self.target!r}, {drafter}slots={self.slots}, max_len={self.config.max_len})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def params(self) -> Params:
        return self.target.params, self.drafter.params

    @property
    def running(self) -> int:
        """Requests that are being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that no slot was free for."""
        return len(self._waiting)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of slots that calls run with, ascending."""
        sizes = {min(1 << power, self.slots) for power in range(self.slots.bit_length() + 1)}
        return tuple(sorted(sizes))

    def _groups(self, size: int) -> list[int]:
        """Numbers of prompts whose last chunks, of one size, make a pass."""
        most = min(self.slots, self._together(size))
        return [1 << power for power in range(most.bit_length())]

    def _together(self, size: int) -> int:
        """How many last chunks of prompts, of one size, make a pass; one where it must have the bits that it has alone."""
        return 1 if self.config.reproducible else max(1, _TOGETHER // size)

    def submit(self, prompt_ids: Sequence[int], max_new_tokens: int | None = None, *, temperature: float | None = None,
               top_k: int | None = None, top_p: float | None = None, min_p: float = 0.0, seed: int | None = None,
               stop_tokens: Sequence[int] | None = None, min_tokens: int = 0,
               logit_bias: Mapping[int, float] | None = None, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
               repetition_penalty: float = 1.0,
               until: Callable[[Sequence[int]], int | None] | None = None, logprobs: int = 0, prompt_logprobs: int = 0
               ) -> Ticket:
        """Asks for a continuation.

        Args:
          prompt_ids: token ids.
          max_new_tokens: where it ends; by default, and at most, where the cache is full.
          temperature, top_k, top_p: as in `Sampling`, and a temperature of 0 is greedy; by default the configuration's.
          min_p: the least probability that stays, as a part of the best token's.
          seed: of the sampling noise, by default the configuration's.
          stop_tokens: ids that end it, at most 16; by default the configuration's.
          min_tokens: before so many none of them is drawn.
          logit_bias: what is added to the logits of some tokens, by their ids, at most 64.
          presence_penalty, frequency_penalty: from -2 to 2, taken off the logit of a token that is among the new ones, the
            second for each time that it is, as OpenAI has them.
          repetition_penalty: by which the logit of a token of prompt or answer is divided, or multiplied where it is below 0
            (arXiv:1909.05858); 1 is none.
          until: is asked on the host, whenever tokens have come, with all new ones so far: how many of them are the answer,
            None where it goes on. What has been decoded behind them is dropped, and so are its rounds.
          logprobs, prompt_logprobs: how many of the likeliest tokens, at most 20, to give with the log-probabilities of the
            answer's and of the prompt's tokens; 0 gives none. They take a pass over these tokens when the answer has ended.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, a prompt longer than the cache, a setting outside its range,
            or an engine that is closed.
        """
        ticket = Ticket(self, Request.of(
            self.target, self.config, prompt_ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, seed=seed, stop_tokens=stop_tokens, min_tokens=min_tokens, logit_bias=logit_bias,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, repetition_penalty=repetition_penalty,
            until=until, logprobs=logprobs, prompt_logprobs=prompt_logprobs))
        with self._arrivals:
            if self._is_closed:
                raise UserError("the engine is closed")
            self._waiting.append(ticket)
        return ticket

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None, **sampling: Any
                 ) -> list[Generation]:
        """The continuations of all prompts, in their order; arguments and errors as in `submit` and `Ticket.result`."""
        tickets = [self.submit(prompt, max_new_tokens, **sampling) for prompt in prompts]
        return [ticket.result() for ticket in tickets]

    def warm_up(self, *, draws: bool = True) -> None:
        """Compiles all that requests will need: loops for best tokens, for draws, and for draws with penalties, for each of
        `buckets` and each tree that a call may choose there, which are also timed; a prompt's last chunk of each length, alone
        and beside others; and one before it. Requests that were submitted are answered first. Unless one `draws`, all are
        expected to be greedy, without a bias, a penalty or a least length."""
        with self._driving:
            while self.step():
                pass
            if self._is_closed:
                raise UserError("the engine is closed")
            loops, made = list(self._loops(draws)), Request(
                prompt=np.zeros(1, np.int32), limit=1, key=RequestKey.of(seed=0), needs=Needs.BEST, stop_tokens=())
            chunk = functools.partial(Chunk.of, made.prompt, 0, begins=True)
            inner = np.int32(0), chunk(self._chunks[-1])
            starts = [(np.arange(count, dtype=np.int32), *(_stacked([each] * count) for each in (
                chunk(size), made.asked(self._capacity))), needs)
                for size in self._chunks for count in self._groups(size)
                for needs in (Needs if draws and count == 1 else (Needs.BEST,))]
            self._compile([(self._run, self._features, slots, needs, choice) for slots, needs, choice in loops]
                          + [(self._admit, *start) for start in starts] + [(self._take_in, *inner)]
                          + [(self._catch_up, self._features, np.arange(size, dtype=np.int32)) for size in self.buckets
                             if len(self._choices) > 1])
            for size in self.buckets:
                if len(self._choices) > 1:
                    self._take_in_lag(range(size))
                for needs in dict.fromkeys(needs for _, needs, _ in loops):
                    self._measure(size, needs)
            self._fill(0)
            self._held = [np.zeros(0, np.int32)] * self.slots  # for rows are written over
            self._state = self._take_in(self.params, self._state, *inner)
            for start in starts:
                self._state, _ = self._admit(self.params, self._state, *start)
            jax.block_until_ready(self._state)

    def _loops(self, draws: bool) -> Iterator[tuple[Int32[np.ndarray, "N"], Needs, int]]:
        """Slots, sampling and choice of every kind of call."""
        for size in self.buckets:
            for needs in Needs if draws else (Needs.BEST,):
                for choice in budgets.affordable(self._choices, size):
                    yield np.arange(size, dtype=np.int32), needs, choice

    def _compile(self, jobs: Sequence[tuple[Any, ...]]) -> None:
        """Compiles functions of parameters, state and what is given with each, many at a time."""
        with concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            for done in [pool.submit(lambda job: job[0].lower(self.params, self._state, *job[1:]).compile(), job)
                         for job in jobs]:
                done.result()

    def _measure(self, size: int, needs: Needs) -> None:
        """Makes the calls of so many slots once, and measures them, in empty and in full caches, if there are several."""
        calls = {choice: functools.partial(self._call, range(size), needs, choice)
                 for choice in budgets.affordable(self._choices, size)}
        for call in calls.values():
            jax.block_until_ready(call())
        if len(self._choices) > 1:
            self._budget.measured(size, needs, budgets.measure(calls, (1, self.config.max_len), self._fill))

    def _fill(self, length: int) -> None:
        self._state = self._filled(self._state, np.int32(length))

    def _call(self, slots: Sequence[int], needs: Needs, choice: int) -> Report:
        self._state, self._features, report = self._run(
            self.params, self._state, self._features, np.asarray(slots, np.int32), needs, choice)
        return report

    def _take_in_lag(self, slots: Sequence[int]) -> None:
        """Has the drafters of these slots take in what was committed without drafts."""
        self._state = self._catch_up(self.params, self._state, self._features, np.asarray(slots, np.int32))
        self._lags[slots] = 0

    def step(self) -> bool:
        """Takes in what waits and has room, starts one call of a few rounds, and reads what the call before it has left.

        Returns whether anything is left to do.
        """
        with self._driving:
            if self._is_closed:
                return False
            try:
                self._enter()
                reported = len(self._pending)
                self._start()
                self._finish_pending(reported)
            except BaseException:
                self._abandon(UserError("the engine has failed and is closed"))
                raise
            return bool(self._running or self._pending or self._entering or self._waiting)

    def cancel(self, ticket: Ticket) -> None:
        """See `Ticket.cancel`."""
        with self._arrivals:
            if ticket.is_done:
                return
            ticket.is_cancelled = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(ticket)

    def close(self) -> None:
        """Ends every request that is not done with a `UserError`, and gives the device's memory back."""
        with self._driving:
            if not self._is_closed:
                self._abandon(UserError("the engine is closed"))

    # the host's side of a step

    def _enter(self) -> None:
        """Chunks of prompts, in all no longer than the longest one, for which what runs has to wait; where nothing runs, a
        chunk at least of all that can."""
        longest = room = self._chunks[-1]
        while room > 0 or not self._running:
            ticket = self._entering = self._entering or self._seat()
            if ticket is None:
                return
            if ticket.is_cancelled:
                self._entering = None
                self._release(ticket)
            elif self._left(ticket) > longest:
                self._state = self._take_in(self.params, self._state, np.int32(ticket.slot), self._chunk(ticket, longest))
                ticket.taken += longest
                room -= longest
            else:
                size = self._size(self._left(ticket))
                tickets = [ticket, *self._mates(ticket, min(room // size, self._together(size)) - 1)]
                self._admit_all(tickets, size)
                self._entering = None
                room -= size * len(tickets)

    def _seat(self, size: int | None = None) -> Ticket | None:
        """The next request in a free slot, if there are both; with a `size` one that is greedy and fits into a chunk of it."""
        with self._arrivals:
            if not self._free or not self._waiting:
                return None
            ticket = self._waiting[0]
            shared = {slot: self._shared(slot, ticket.request.prompt) for slot in self._free}
            slot = max(self._free, key=lambda slot: (shared[slot], -self._free.index(slot)))  # else the one free the longest
            if size and (ticket.request.needs or self._size(len(ticket.request.prompt) - shared[slot]) != size):
                return None
            self._waiting.popleft()
        ticket.slot, ticket.taken, ticket.reused = slot, shared[slot], shared[slot]
        self.reused += ticket.reused
        if ticket.reused and self._lags[slot]:
            self._take_in_lag([slot])
        self._lags[slot] = 0
        self._free.remove(slot)
        self._holders[slot], self._held[slot] = ticket, np.zeros(0, np.int32)
        ticket.times.append(time.perf_counter())
        return ticket

    def _mates(self, ticket: Ticket, most: int) -> Iterator[Ticket]:
        """Requests that wait behind one of a single greedy chunk and can be taken in with it, in one pass."""
        size = self._size(self._left(ticket))
        if ticket.request.needs or ticket.taken > ticket.reused:
            return
        while most > 0 and (mate := self._seat(size)):
            most -= 1
            yield mate

    def _admit_all(self, tickets: Sequence[Ticket], size: int) -> None:
        """Takes in the last chunks and starts the sequences: a power of two of them in a pass."""
        while tickets:
            count = 1 << len(tickets).bit_length() - 1
            group, tickets = tickets[:count], tickets[count:]
            chunks = _stacked([self._chunk(ticket, size) for ticket in group])
            asked = _stacked([ticket.request.asked(self._capacity) for ticket in group])
            slots = np.asarray([ticket.slot for ticket in group], np.int32)
            self._state, first = self._admit(self.params, self._state, slots, chunks, asked, group[0].request.needs)
            self.admitted += count
            self._pending.append((list(group), 0, first))
            for ticket in group:
                self._running[ticket.slot] = ticket
                ticket.coming += 1

    def _left(self, ticket: Ticket) -> int:
        """Tokens of its prompt that are still to be taken in."""
        return len(ticket.request.prompt) - ticket.taken

    def _size(self, count: int) -> int:
        """Of the chunks that are compiled the shortest that holds so many tokens, else the longest."""
        return next((size for size in self._chunks if size >= count), self._chunks[-1])

    def _chunk(self, ticket: Ticket, size: int) -> Chunk:
        """The next tokens of its prompt."""
        return Chunk.of(ticket.request.prompt, ticket.taken, size, begins=ticket.taken == ticket.reused)

    def _shared(self, slot: int, prompt: Int32[np.ndarray, "n"]) -> int:
        """Tokens of a prompt that need not be taken in again where a slot is free: those that it begins with like what the slot
        holds, but for the last of them, behind which a drafter may read on."""
        return max(0, shared_tokens(self._held[slot], prompt[:-1]) - 1)

    def _keep(self, ticket: Ticket) -> None:
        """Notes what the slot of a request that has ended holds; its drafter may not have taken in the last two tokens."""
        # where a function has ended it the device may go on, and take in other tokens: that costs the next request drafts alone
        can_reuse = not self.config.reproducible and getattr(self.drafter, "resumes", False)
        if can_reuse and ticket.error is None and self._holders[ticket.slot] is ticket:
            self._held[ticket.slot] = np.asarray([*ticket.request.prompt, *ticket.tokens][:-2], np.int32)

    def _start(self) -> None:
        """A call on the slots that run, filled up with free ones to a bucket."""
        for slot, ticket in list(self._running.items()):
            if ticket.is_cancelled:
                del self._running[slot]
                self._release(ticket)
        if not self._running:
            return
        running = dict(self._running)
        self.active = len(running)
        size = next(size for size in self.buckets if size >= len(running))
        others = (slot for slot in range(self.slots) if slot not in running and slot != self._entering_slot)
        slots = [*running, *(slot for slot, _ in zip(others, range(size - len(running)), strict=False))]
        if len(slots) < size:  # the slot that is being filled stands aside
            slots = [*slots, self._entering_slot]
        needs = max(ticket.request.needs for ticket in running.values())
        lengths = [len(ticket.request.prompt) + ticket.count for ticket in running.values()]
        choice = self._budget.choose(size, needs, sum(lengths) / len(lengths))
        self.calls[self._choices[choice].tree_size] += 1
        lag = ROUNDS if self._slots.leaves_behind(choice) else 0
        if self._lags[list(running)].max() > (self._slots.most_lag - lag if lag else 0):
            self._take_in_lag(slots)
        self._lags[list(running)] += lag
        report = self._call(slots, needs, choice)
        self._pending.append(([running.get(slot) for slot in slots], choice, report))
        for slot, ticket in running.items():
            ticket.coming += ROUNDS
            if self._ends_for_certain(ticket):
                del self._running[slot]
                self._release(ticket)

    def _ends_for_certain(self, ticket: Ticket) -> bool:
        """Whether what has been started will bring it to its limit: a round commits a token at least."""
        # a hierarchy's inner rounds, and what log-probabilities need, are read from the slot when the request has ended
        return (ticket.count + ticket.coming >= ticket.request.limit - len(ticket.request.prompt)
                and not isinstance(self.drafter, HierarchicalDrafter)
                and not ticket.request.logprobs and not ticket.request.prompt_logprobs)

    @property
    def _entering_slot(self) -> int:
        return -1 if self._entering is None else self._entering.slot

    def _finish_pending(self, count: int | None = None) -> None:
        """Reads what the oldest calls have left: all of them, or so many."""
        taken, self._pending = self._pending[:count], [] if count is None else self._pending[count:]
        for tickets, choice, report in taken:
            if isinstance(report, First):
                first = self._read(report)
                for place, ticket in enumerate(tickets):
                    assert ticket is not None
                    ticket.times.append(time.perf_counter())
                    ticket.coming -= 1
                    token, fault = int(first.token[place]), int(first.fault[place])
                    is_of_prompt = 0 <= fault < len(ticket.request.prompt)
                    self._told(ticket, [] if is_of_prompt else [token], bool(first.done[place]), fault)
                continue
            length, rounds, fault, done, fresh = self._read(
                (report.length, report.rounds, report.fault, report.done, report.fresh))
            accepted = functools.cache(functools.partial(np.asarray, report.accept_lengths))

            def lengths(place: int, accepted: Callable[[], Any] = accepted, rounds: Any = rounds) -> Any:
                return accepted()[place, :rounds[place]]

            found = np.zeros(2, np.int64)
            for place, ticket in enumerate(tickets):
                if ticket is None:
                    continue
                ticket.coming -= ROUNDS
                if ticket.is_done:
                    continue
                news = int(length[place]) - len(ticket.request.prompt) - ticket.count
                found += news, int(rounds[place]) - ticket.rounds
                ticket.rounds = int(rounds[place])
                self._told(ticket, fresh[place, :news].tolist(), bool(done[place]), int(fault[place]),
                           functools.partial(lengths, place))
            self._budget.learn(choice, *found.tolist())

    def _read(self, report: Any) -> Any:
        start = time.perf_counter()
        found = jax.device_get(report)
        self.waited += time.perf_counter() - start
        return found

    def _told(self, ticket: Ticket, tokens: list[int], done: bool, fault: int,
              accept_lengths: Callable[[], Int32[np.ndarray, "r"]] = lambda: np.zeros(0, np.int32)) -> None:
        if ticket.is_cancelled:
            return
        request, slot = ticket.request, ticket.slot
        everything = [*ticket.tokens, *tokens]
        end = request.until(everything) if request.until and tokens else None
        if end is None and done and fault >= 0:
            committed = np.asarray([*request.prompt, *everything], np.int32)
            ticket.error = not_finite(self.target, fault, committed, len(request.prompt))
        elif done or end is not None:
            _, admitted, first = ticket.times
            lengths, inner = accept_lengths(), np.zeros(0, np.int32)
            kept = len(lengths) if end is None else rounds_until(end, lengths)
            if isinstance(self.drafter, HierarchicalDrafter):
                inner = self.drafter.accept_lengths(side_by_side.take(self._state.drafter, slot))
                inner = inner[:round(len(inner) * kept / max(1, kept, len(lengths)))]
            everything, stopped = everything[:end], end is None and (
                len(request.prompt) + len(everything) < request.limit or everything[-1] in request.stop_tokens)
            ticket.generation = Generation(
                tokens=np.asarray(everything, np.int32), seconds=time.perf_counter() - first, accept_lengths=lengths[:kept],
                prefill_seconds=first - admitted, draft_prefill_seconds=0.0, draft_accept_lengths=inner, stopped=stopped,
                **self._logprobs(ticket, everything))
        ticket.tokens = everything
        if ticket.is_done:
            self._keep(ticket)
        if ticket.is_done and self._running.get(slot) is ticket:
            del self._running[slot]
            self._release(ticket)

    def _logprobs(self, ticket: Ticket, tokens: Sequence[int]) -> dict[str, Logprobs]:
        """Those that the request asks for of its prompt's and these tokens."""
        request = ticket.request
        prompt, asked = len(request.prompt), {"prompt_logprobs": request.prompt_logprobs, "logprobs": request.logprobs}
        if not any(asked.values()):
            return {}
        committed, size = np.asarray([*request.prompt, *tokens], np.int32), self._chunks[0]
        first, found = 0 if request.prompt_logprobs else prompt - 1, []
        for start in range(first, len(committed) - 1, size):
            chunk = Chunk.of(committed, start, size, begins=False)
            self._state, scores = self._scores(self.params, self._state, np.int32(ticket.slot), chunk)
            found.append([each[:min(size, len(committed) - 1 - start)] for each in self._read(scores)])
        own, best, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        places = {"prompt_logprobs": slice(0, prompt - 1), "logprobs": slice(prompt - 1 - first, None)}
        return {name: Logprobs(tokens=own[places[name]], best=best[places[name], :most],
                               best_logprobs=values[places[name], :most]) for name, most in asked.items() if most}

    def _release(self, ticket: Ticket) -> None:
        self._free.append(ticket.slot)

    def _abandon(self, error: Exception) -> None:
        with self._arrivals:
            self._is_closed = True
            entering = [self._entering] if self._entering else []
            started = [ticket for tickets, *_ in self._pending for ticket in tickets if ticket]
            for ticket in (*self._waiting, *self._running.values(), *entering, *started):
                if not ticket.is_done:
                    ticket.error = error
            self._waiting.clear()
        self._running, self._entering, self._pending, self._state, self._features = {}, None, [], None, None

    def _make_choices(self) -> tuple[Drafter, ...]:
        return budgets.choices(self.drafter)

    def _make_rounds(self) -> Rounds:
        return dataclasses.replace(Rounds.of(self.target, self.drafter, self.config), sampling=RequestSampling())


def _stacked(parts: Sequence[Any]) -> Any:
    """One tree of arrays of several, which it has along a first axis."""
    return jax.tree.map(lambda *each: np.stack(each), *parts)
