"""What `experiments.decode_bench` measures of a target with random weights: verification, drafting, rounds, prefill."""

import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

import specmq_jax as sm
from experiments.timing.random_models import Drafting
from specmq_jax.decoding.compilation import enable_persistent_cache
from specmq_jax.decoding.costs import traffic
from specmq_jax.decoding.costs.parts import Parts, repeated_pass, some_tree
from specmq_jax.decoding.costs.timing import Timing, time_loop
from specmq_jax.loading.memory import check_room, tree_bytes
from specmq_jax.network.cache import KVCache

PARTS = ("verify", "draft", "step", "prefill")
PREFILL_RUNS = 5
_ROOM = 512
"""Cache rows behind the longest context, for the rounds of one run."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
      config: sizes of the target.
      precisions: of its weights, one after another.
      head_precision: of its lm_head; None leaves it dense.
      methods: whose drafts and rounds to time.
      drafting: what they draft with.
      parts: some of `PARTS`.
      contexts: tokens in the cache before a step.
      rows: n of T_v(n), the rows of one verification.
      prefill: tokens of the prompts whose prefill is timed.
      runs: of each loop.
      reproducible: as in `specmq_jax.DecodeConfig`.
    """

    config: sm.LlamaConfig
    precisions: tuple[str, ...]
    head_precision: str | None = None
    methods: tuple[str, ...]
    drafting: Drafting
    parts: tuple[str, ...]
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    prefill: tuple[int, ...]
    runs: int = 30
    reproducible: bool = False

    @property
    def decode_config(self) -> sm.DecodeConfig:
        """Of one cache length for everything, so that each function is compiled once."""
        lengths = self.contexts if set(self.parts) - {"prefill"} else ()
        lengths += self.prefill if "prefill" in self.parts else ()
        return sm.DecodeConfig(max_len=max(lengths) + _ROOM, reproducible=self.reproducible)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure.

    Attributes:
      part: one of `PARTS`.
      name: what was timed, for example "T_v(16)" or "eagle2 draft".
      precision: of the target; formats: of its linear layers, lm_head and embedding.
      method: whose it is; None for the target alone.
      context: tokens in the cache before each step, 0 for a prefill.
      rows: that the target takes in one pass, or that a prompt has; None where only a drafter runs.
      timing: of the step.
      moved: bytes that a step must move, as in `specmq_jax.decoding.costs.traffic`.
      held: bytes of the weights and caches in use, the drafter's included.
      peak: bytes of device memory, the most since the process began; None where the device doesn't tell.
      accept_length: tokens that a round committed; None where none were.
      inner_rounds: of the small model in a hierarchical draft; None for other methods.
      bandwidth: bytes a second of the floor: as given, or those of a copy right behind the runs; None where there was no room
        for one.
    """

    part: str
    name: str
    precision: str
    formats: Mapping[str, str]
    method: str | None = None
    context: int
    rows: int | None = None
    timing: Timing
    moved: float
    held: int
    peak: int | None
    accept_length: float | None = None
    inner_rounds: float | None = None
    bandwidth: float | None = None

    @property
    def floor(self) -> float | None:
        """Seconds that its bytes take at the bandwidth."""
        return self.moved / self.bandwidth if self.bandwidth else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of a prompt that is taken in."""
        return self.rows / self.median if self.part == "prefill" else None

    @property
    def median(self) -> float:
        """Seconds a step."""
        return self.timing.median

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile of the runs' seconds a step."""
        low, high = np.percentile(self.timing.seconds, (10, 90))
        return float(low), float(high)


def measure(settings: Settings) -> Iterator[Measure]:
    """Measures all that the settings name and yields each figure as soon as it is known.

    Raises:
      UserError: weights or caches that the device has no room for, or a drafter that doesn't fit the target.
    """
    enable_persistent_cache()
    for precision in settings.precisions:
        bench = _Bench(settings, sm.random_model(settings.config, precision, head=settings.head_precision))
        if "verify" in settings.parts:
            yield from bench.verifications()
        if "prefill" in settings.parts:
            yield from bench.prefills()
        if {"draft", "step"} & set(settings.parts):
            for method in settings.methods:
                yield from bench.rounds(method)
        del bench
        jax.clear_caches()  # jitted functions hold on to their decoders, and these to the weights
        gc.collect()


class _Bench:
    """The measures of one target."""

    def __init__(self, settings: Settings, target: sm.Model) -> None:
        self._settings, self._target, self._decode_config = settings, target, settings.decode_config
        self._plain = sm.Decoder(target, config=self._decode_config)

    def verifications(self) -> Iterator[Measure]:
        """T_v(n), the target's pass over n rows with the best token after each; T_v(1) is plain decoding's T_t."""
        target = self._target
        cache = _random_cache(target, -(-(self._decode_config.max_len + max(self._settings.rows)) // 128) * 128)
        held = tree_bytes(target.params, cache)
        for rows in self._settings.rows:
            loop = repeated_pass(self._plain.module)
            for context in self._settings.contexts:
                carry = cache.rewind(context), some_tree(rows, target.config.vocab_size)
                timing, _, (cache, _) = time_loop(loop, target.params, carry, runs=self._settings.runs)
                yield self._figure("verify", f"T_v({rows})", timing, context=context, rows=rows, held=held,
                                   moved=traffic.pass_bytes(target, context))

    def prefills(self) -> Iterator[Measure]:
        """The target's pass over prompts, as `Decoder.generate` times it."""
        decoder, target = self._plain, self._target
        for length in self._settings.prefill:
            prompt = _prompt(length, target)
            start = time.perf_counter()
            decoder.generate(prompt, 1)
            first_call = time.perf_counter() - start
            seconds = tuple(decoder.generate(prompt, 1).prefill_seconds for _ in range(PREFILL_RUNS))
            yield self._figure("prefill", f"prefill of {length}", Timing(seconds=seconds, steps=1, first_call=first_call),
                               context=0, rows=length, held=_held(decoder), moved=traffic.pass_bytes(target, length))

    def rounds(self, method: str) -> Iterator[Measure]:
        """A method's drafting alone, the verification of its drafts, and whole rounds."""
        drafter = self._settings.drafting.drafter(method, self._target)
        decoder = sm.Decoder(self._target, drafter, self._decode_config)
        parts = Parts(decoder, runs=self._settings.runs)
        for context in self._settings.contexts:
            yield from self._rounds(method, decoder, parts, context)
        if isinstance(drafter, sm.HierarchicalDrafter) and "draft" in self._settings.parts:
            yield from self._inner(method, drafter)

    def _rounds(self, method: str, decoder: sm.Decoder, parts: Parts, context: int) -> Iterator[Measure]:
        drafter, wanted = decoder.drafter, self._settings.parts
        about = {"method": method, "context": context, "held": _held(decoder)}
        parts.start(_prompt(context, self._target))
        if "draft" in wanted and drafter.max_depth:
            timing, end = parts.draft()
            inner = _inner_rounds(drafter, end, timing.steps)
            yield self._figure("draft", f"{method} draft", timing, **about, inner_rounds=inner,
                               moved=traffic.draft_bytes(drafter, context, inner or 0))
        if "step" in wanted and drafter.max_depth:
            yield self._figure("step", f"{method} verify", parts.verify(), **about, rows=drafter.tree_size,
                               moved=traffic.pass_bytes(self._target, context))
        if "step" in wanted:
            timing, end = parts.rounds()
            inner = _inner_rounds(drafter, end.drafter, timing.steps)
            yield self._figure("step", f"{method} step", timing, **about, rows=drafter.tree_size, inner_rounds=inner,
                               moved=traffic.round_bytes(self._target, drafter, context, inner or 0, _ahead(drafter, end)),
                               accept_length=_accept_length(end))

    def _inner(self, method: str, drafter: sm.HierarchicalDrafter) -> Iterator[Measure]:
        """Rounds of a hierarchical drafter's small model."""
        small, decoder = drafter.model, sm.Decoder(drafter.model, drafter.inner, self._decode_config)
        parts = Parts(decoder, runs=self._settings.runs)
        for context in self._settings.contexts:
            parts.start(_prompt(context, small))
            timing, end = parts.rounds()
            yield self._figure("draft", f"{method} inner round", timing, method=method, context=context,
                               held=_held(decoder) + tree_bytes(self._target.params), accept_length=_accept_length(end),
                               moved=traffic.round_bytes(small, drafter.inner, context))

    def _figure(self, part: str, name: str, timing: Timing, **fields: Any) -> Measure:
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        module = self._target.module
        formats = {"linear": module.format.name, "head": module.head_format.name, "embed": module.embed_format.name}
        return Measure(part=part, name=name, precision=self._target.precision, formats=formats, timing=timing, peak=peak,
                       **fields)


def _random_cache(model: sm.Model, rows: int) -> KVCache:
    """A cache full of normal values: zeros take less power, and with it a device at its power limit less time."""
    check_room(rows * traffic.row_bytes(model.new_cache), f"a cache of {rows} tokens")
    empty = jax.eval_shape(lambda: model.new_cache(rows))
    leaves, structure = jax.tree.flatten(empty.layers)
    draw = jax.jit(lambda key: jax.random.normal(key, leaves[0].shape, leaves[0].dtype))
    drawn = [draw(key) for key in jax.random.split(jax.random.key(0), len(leaves))]
    return KVCache(layers=jax.tree.unflatten(structure, drawn), length=jnp.int32(0), limit=rows)


def _prompt(length: int, model: sm.Model) -> Int32[np.ndarray, "n"]:
    return np.random.default_rng(length).integers(0, model.config.vocab_size, length).astype(np.int32)


def _inner_rounds(drafter: sm.Drafter, end: Any, rounds: int) -> float | None:
    """A round's, where a run of `rounds` rounds ended in this state of the drafter."""
    return int(end.rounds) / rounds if isinstance(drafter, sm.HierarchicalDrafter) else None


def _ahead(drafter: sm.Drafter, end: sm.DecodeState) -> float:
    """Passes a round of a hierarchy's small model that go a token ahead."""
    rounds = int(end.rounds)
    if not isinstance(drafter, sm.HierarchicalDrafter) or not rounds:
        return 0.0
    accepted = np.asarray(end.accept_lengths)[:rounds].tolist()
    return traffic.rounds_ahead(drafter, accepted, drafter.accept_lengths(end.drafter).tolist()) / rounds


def _accept_length(end: sm.DecodeState) -> float | None:
    rounds = int(end.rounds)
    return float(np.asarray(end.accept_lengths)[:rounds].mean()) if rounds else None


def _held(decoder: sm.Decoder) -> int:
    return tree_bytes(decoder.params) + decoder.state_bytes
