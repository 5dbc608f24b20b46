"""What `experiments.batch_bench` measures: an engine with requests that come and go, of a target with random weights."""

import dataclasses
import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import specmq_jax as sm
from experiments.timing.random_models import Drafting
from specmq_jax.decoding.compilation import enable_persistent_cache
from specmq_jax.decoding.drafters import Drafter
from specmq_jax.decoding.rounds import DecodeState, Rounds
from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.decoding.verification import verify
from specmq_jax.network.cache import KVCache

_LEAST_REQUESTS, _TURNS = 6, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
      config: sizes of the target; precisions: of its layers; head_precision: of its lm_head, None for dense.
      methods, drafting: ways of drafting, and with what.
      batches: numbers of slots.
      contexts: tokens of the prompts.
      tokens: the least and the most that a request asks for; each draws its own between them.
      accept_length: mean tokens that a round commits, which random weights are made to; None leaves them as they are.
      reproducible: as in `DecodeConfig`.
      budget: as in `Engine`.
    """

    config: sm.LlamaConfig
    precisions: tuple[str, ...]
    head_precision: str | None = None
    methods: tuple[str, ...]
    drafting: Drafting
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: tuple[int, int] = (64, 512)
    accept_length: float | None = None
    reproducible: bool = False
    budget: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One batch size's figures.

    Attributes:
      precision, method, batch, context: which.
      tokens, seconds: committed while requests came and went and every slot was taken, and that time, prompts included.
      decoding_tokens, decoding_seconds: of as many requests as there are slots, all of one length, behind their prompts.
      accept_length: mean over rounds.
      calls: of those requests of one length, by the nodes of the trees that were drafted, 1 where none was.
      host: share of the decoding seconds in which the host did not wait for the device, which so may have waited for it.
      warm_up: seconds that compiling took.
      peak: bytes of device memory, the most since the process began; None where the device doesn't tell.
    """

    precision: str
    method: str
    batch: int
    context: int
    tokens: int
    seconds: float
    decoding_tokens: int
    decoding_seconds: float
    accept_length: float
    calls: Mapping[int, int]
    host: float
    warm_up: float
    peak: int | None

    @property
    def tokens_per_second(self) -> float | None:
        """With the prompts' time; None where the requests were too short for every slot to be taken at a time."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def decoding_tokens_per_second(self) -> float | None:
        """Without it; None where the requests were too short to tell."""
        return self.decoding_tokens / self.decoding_seconds if self.decoding_seconds else None

    @property
    def drafted(self) -> float:
        """Share of the calls, each of as many rounds, that drafted."""
        return 1 - self.calls.get(1, 0) / max(1, sum(self.calls.values()))

    @property
    def tokens_per_second_of_a_user(self) -> float | None:
        """Of one sequence, without the prompts' time."""
        return self.decoding_tokens_per_second and self.decoding_tokens_per_second / self.batch


@dataclasses.dataclass(frozen=True, eq=False)
class _ForcedRounds(Rounds):
    """Rounds in which the target draws what was drafted, as far as a mean accept length asks for."""

    accept_length: float = 1.0

    def verify(self, params: Any, state: DecodeState, tree: DraftTree) -> tuple[Accepted, KVCache]:
        """As `Rounds.verify`, on the path to the deepest node."""
        def choose(logits: Float[Array, "T V"]) -> Int32[Array, "T"]:
            drawn = self.chosen(logits, state, tree)
            return jnp.where(tree.depth < self._drafts(state), self._next_on_path(tree, drawn), drawn)

        return verify(self.module, params, state.cache, tree, choose)

    def _drafts(self, state: DecodeState) -> Int32[Array, ""]:
        """How many to accept: the mean's whole part, and one more as often as its fraction says."""
        wanted = self.accept_length - 1
        return jnp.floor((state.rounds + 1) * wanted).astype(jnp.int32) - jnp.floor(state.rounds * wanted).astype(jnp.int32)

    @staticmethod
    def _next_on_path(tree: DraftTree, drawn: Int32[Array, "T"]) -> Int32[Array, "T"]:
        path = tree.mask[jnp.argmax(jnp.where(tree.tokens >= 0, tree.depth, -1))]
        follows = path[None, :] & (tree.depth[None, :] == tree.depth[:, None] + 1)
        return jnp.where(follows.any(1) & path, tree.tokens[jnp.argmax(follows, axis=1)], drawn)


class _ForcedEngine(sm.Engine):
    """An engine whose accept length is given. It tells nothing of what smaller trees would accept, and so there are none."""

    def __init__(self, target: sm.Model, drafter: Drafter, config: sm.DecodeConfig, *, slots: int, budget: bool,
                 accept_length: float) -> None:
        self._accept_length = accept_length
        super().__init__(target, drafter, config, slots=slots, budget=budget)

    def _make_choices(self) -> tuple[Drafter, ...]:
        return self.drafter, sm.NoDrafter()

    def _make_rounds(self) -> Rounds:
        rounds = super()._make_rounds()
        return _ForcedRounds(rounds.module, rounds.drafter, rounds.sampling, self._accept_length)


def measure(settings: Settings) -> Iterator[Measure]:
    """Measures all that the settings name and yields each figure as soon as it is known.

    Raises:
      UserError: weights or slots that the device has no room for, or a drafter that doesn't fit the target.
    """
    enable_persistent_cache()
    for precision in settings.precisions:
        target = sm.random_model(settings.config, precision, head=settings.head_precision)
        for method in settings.methods:
            drafter = settings.drafting.drafter(method, target)
            for context in settings.contexts:
                for batch in settings.batches:
                    yield _measure(settings, target, drafter, method, context, batch)
        del target, drafter
        jax.clear_caches()
        gc.collect()


def _measure(settings: Settings, target: sm.Model, drafter: Drafter, method: str, context: int, batch: int) -> Measure:
    least, most = settings.tokens
    config = sm.DecodeConfig(max_len=context + most + 1, reproducible=settings.reproducible)
    if settings.accept_length and drafter.max_depth:
        engine: sm.Engine = _ForcedEngine(target, drafter, config, slots=batch, budget=settings.budget,
                                          accept_length=settings.accept_length)
    else:
        engine = sm.Engine(target, drafter, config, slots=batch, budget=settings.budget)
    with engine:
        start = time.perf_counter()
        engine.warm_up(draws=False)
        warm_up = time.perf_counter() - start
        rng = np.random.default_rng(batch)

        def submitted(lengths: Iterable[int]) -> list[sm.Ticket]:
            return [engine.submit(rng.integers(0, target.config.vocab_size, context).tolist(), int(length))
                    for length in lengths]

        for ticket in submitted([least] * batch if drafter.max_depth else ()):
            ticket.result()  # from which the engine learns accept lengths
        before = engine.calls.copy()
        together = _Together(engine, submitted([most] * batch))
        together.run()
        calls = engine.calls - before
        figures = _Figures(engine, submitted(rng.integers(least, most + 1, max(_LEAST_REQUESTS, _TURNS * batch))))
        figures.run()
        rounds = np.concatenate([ticket.result().accept_lengths for ticket in figures.tickets])
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return Measure(
        precision=target.precision, method=method, batch=batch, context=context, tokens=figures.tokens,
        seconds=figures.seconds, decoding_tokens=together.tokens, decoding_seconds=together.seconds,
        accept_length=float(rounds.mean()), calls=dict(calls),
        host=1 - together.waited / together.seconds if together.seconds else 0.0, warm_up=warm_up, peak=peak)


class _Together:
    """Steps an engine to the end of requests that fill its slots, and counts from where the last has begun to where the first
    has ended."""

    def __init__(self, engine: sm.Engine, tickets: list[sm.Ticket]) -> None:
        self._engine, self.tickets = engine, tickets
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0

    def run(self) -> None:
        """Until every request is done."""
        goes_on, begin = True, None
        while goes_on:
            goes_on = self._engine.step()
            now = time.perf_counter(), _committed(self.tickets), self._engine.waited
            if any(ticket.is_done for ticket in self.tickets):
                continue
            if begin is None and all(ticket.count > 1 for ticket in self.tickets):
                begin = now
            if begin:
                self.seconds, self.tokens, self.waited = (after - before for before, after in zip(begin, now, strict=True))


class _Figures:
    """Steps an engine to its end, and counts while no slot is free and none will be for want of requests."""

    def __init__(self, engine: sm.Engine, tickets: list[sm.Ticket]) -> None:
        self._engine, self.tickets = engine, tickets
        self.tokens, self.seconds = 0, 0.0

    def run(self) -> None:
        """Until every request is done."""
        goes_on, begin = True, None
        while goes_on:
            goes_on = self._engine.step()
            now = time.perf_counter(), _committed(self.tickets)
            if begin is None and self._engine.active == self._engine.slots:
                begin = now
            if begin and self._engine.waiting:
                self.seconds, self.tokens = now[0] - begin[0], now[1] - begin[1]


def _committed(tickets: Sequence[sm.Ticket]) -> int:
    return sum(ticket.count for ticket in tickets)
