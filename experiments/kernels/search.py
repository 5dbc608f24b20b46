"""The search for a problem's best config: compile many side by side, time each briefly, time the best ones again."""

import concurrent.futures
import dataclasses
import functools
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from experiments.kernels import timing
from experiments.kernels.cases import Case
from experiments.kernels.problems import Problem
from experiments.kernels.timing import Loop, Plan

TOLERANCE = 2e-2
"""Of the norm of a result's difference from the reference's, over its norm: far above what f16 sums in another order give."""
_LOOP_SECONDS = 5e-3
_QUICK_RUNS, _FINAL_RUNS, _FINALISTS = 3, 20, 6
_HOPELESS = 1.5  # times the best so far
_PARENTS = 3  # the best configs, whose neighbours are tried


class OutOfTimeError(Exception):
    """The deadline came before a decision."""


class NoYardstickError(Exception):
    """The heuristic's config, whose time the others are compared with, does not run or is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How to look for a config.

    Attributes:
      most: configs to try at most, besides the heuristic's. Where there are more candidates, a random third of this number
        is tried first, then candidates that differ from one of the best in a single field.
      deadline: on `time.monotonic`'s clock, in seconds.
      implementation: of the op, see `launch.choose`.
    """

    most: int = 200
    deadline: float | None = None
    implementation: str = "kernel"

    def seconds_left(self) -> float | None:
        """Until the deadline, at least 0; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def check_time(self) -> None:
        """Raises OutOfTimeError behind the deadline."""
        if self.seconds_left() == 0:
            raise OutOfTimeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found.

    Attributes:
      config: the best.
      heuristic_seconds, seconds: of a call with the heuristic's config and with the best, for each case.
      tried: configs that were compiled, the heuristic's included.
      failed: what those said that did not compile or run, a line each.
      wrong: configs whose result differs from that of the op's reference.
    """

    config: Any
    heuristic_seconds: tuple[float, ...]
    seconds: tuple[float, ...]
    tried: int
    failed: tuple[str, ...]
    wrong: int


def best(problem: Problem, search: Search) -> Result:
    """The config of the least time relative to the heuristic's, summed over the problem's cases.

    Raises:
      OutOfTimeError, NoYardstickError: see there.
    """
    return _Bench(problem, search).decide()


class _Bench:
    """One problem's operands, what came out of its configs so far, and how long they took."""

    def __init__(self, problem: Problem, search: Search):
        self.problem, self.search = problem, search
        self.plan = Plan.of(cold_bytes=min(case.cold_bytes for case in problem.cases), seconds=_LOOP_SECONDS,
                            traffic=max(case.traffic for case in problem.cases))
        self.operands = [case.operands(self.plan.copies) for case in problem.cases]
        self.abstract = [case.abstract_operands(self.plan.copies) for case in problem.cases]
        self.expected = [self._reference(case, *given)
                         for case, *given in zip(problem.cases, self.abstract, self.operands, strict=True)]
        self.loops: dict[Any, list[Loop]] = {}
        self.seconds: dict[Any, tuple[float, ...]] = {}
        self.tried: set = set()
        self.failed: list[str] = []
        self.wrong = 0

    def decide(self) -> Result:
        heuristic = self.problem.heuristic
        self._try([heuristic])
        if self.wrong:
            raise NoYardstickError("for the result of the heuristic's config is not the reference's")
        if heuristic not in self.seconds:
            raise NoYardstickError(f"for the heuristic's config fails: {self.failed[0]}")
        candidates = [config for config in dict.fromkeys(self.problem.candidates) if config != heuristic]
        if len(candidates) <= self.search.most:
            self._try(candidates)
        else:
            self._try(random.Random(0).sample(candidates, -(-self.search.most // 3)))
            while batch := self._neighbours(candidates):
                self._try(batch)
        finalists = dict.fromkeys([heuristic, *self._ranked()[:_FINALISTS]])
        self._time_in_turns(finalists)
        winner = min(finalists, key=self._score)
        return Result(config=winner, heuristic_seconds=self.seconds[heuristic], seconds=self.seconds[winner],
                      tried=len(self.tried), failed=tuple(self.failed), wrong=self.wrong)

    def _time_in_turns(self, configs: Collection[Any]) -> None:
        """Medians of many runs each. A GPU at its limit of power slows down while it is measured: whoever comes first would
        win."""
        turns = {config: [] for config in configs}
        for _ in range(_FINAL_RUNS):
            self.search.check_time()
            for config, seconds in turns.items():
                seconds.append(self._time(config, lambda run_time, case: run_time()))
        self.seconds |= {config: tuple(map(statistics.median, zip(*seconds, strict=True))) for config, seconds in turns.items()}

    def _try(self, batch: Sequence[Any]) -> None:
        """Compiles all of a batch, then runs, checks and times one after the other."""
        self.tried.update(batch)
        for config, compiled in self._compile(batch):
            self.search.check_time()
            try:
                loops = compiled()
                right = self._is_right(loops)
            except Exception as error:  # Triton and XLA refuse a config in many ways
                self.failed.append(f"{str(error).strip() or repr(error)}".splitlines()[0][:160])
                self._check_device()
                continue
            if not right:
                self.wrong += 1
                continue
            self.loops[config] = loops
            self.seconds[config] = self._time(config, self._quick)

    def _compile(self, batch: Sequence[Any]) -> list[tuple[Any, Callable[[], list[Loop]]]]:
        """Each config with a function that gives its loops, or raises what compiling them raised."""
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        try:
            futures = {config: pool.submit(self._loops, config) for config in batch}
            for future in futures.values():
                future.exception(timeout=self.search.seconds_left())
        except TimeoutError as error:
            raise OutOfTimeError from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [(config, future.result) for config, future in futures.items()]

    def _loops(self, config: Any) -> list[Loop]:
        """A loop for each case; cases that differ in values alone share one."""
        compiled: dict[tuple, Loop] = {}
        loops = []
        for case, copies in zip(self.problem.cases, self.abstract, strict=True):
            signature = tuple((operand.shape, operand.dtype) for operand in copies[0])
            if signature not in compiled:
                compiled[signature] = timing.compile_loop(case.step(config, self.search.implementation), copies, self.plan,
                                                          carried=case.carried)
            loops.append(compiled[signature])
        return loops

    def _is_right(self, loops: Sequence[Loop]) -> bool:
        """Runs each case and compares its results with the reference's."""
        results = [_run(loop, operands) for loop, operands in zip(loops, self.operands, strict=True)]
        return all(np.linalg.norm(array - expected) <= TOLERANCE * np.linalg.norm(expected)
                   for arrays, all_expected in zip(results, self.expected, strict=True)
                   for array, expected in zip(arrays, all_expected, strict=True))

    def _reference(self, case: Case, abstract: Sequence[timing.Operands], operands: Sequence[timing.Operands]
                   ) -> list[np.ndarray]:
        """What a loop of this case leaves, by one call of the op's reference on each copy."""
        once = dataclasses.replace(self.plan, repeats=1, rounds=1)
        return _run(timing.compile_loop(case.step(None, "reference"), abstract, once, carried=case.carried), operands)

    def _check_device(self) -> None:
        """Raises where a config has broken the device, lest the configs behind it fail for that."""
        for loop, operands in zip(self.loops.get(self.problem.heuristic, ()), self.operands, strict=False):
            loop(operands)

    def _time(self, config: Any, measure: Callable[[Callable[[], float], int], float]) -> tuple[float, ...]:
        return tuple(measure(functools.partial(timing.run_time, loop, operands), case)
                     for case, (loop, operands) in enumerate(zip(self.loops[config], self.operands, strict=True)))

    def _quick(self, run_time: Callable[[], float], case: int) -> float:
        first = run_time()
        so_far = min((seconds[case] for seconds in self.seconds.values()), default=first)
        return first if first > _HOPELESS * so_far else min(first, *(run_time() for _ in range(_QUICK_RUNS - 1)))

    def _score(self, config: Any) -> float:
        yardstick = self.seconds[self.problem.heuristic]
        return sum(seconds / other for seconds, other in zip(self.seconds[config], yardstick, strict=True))

    def _ranked(self) -> list[Any]:
        return sorted(self.seconds, key=self._score)

    def _neighbours(self, candidates: Sequence[Any]) -> list[Any]:
        """Untried candidates that differ from one of the best in a single field, as many as there is room for."""
        parents = [dataclasses.asdict(config) for config in self._ranked()[:_PARENTS]]

        def is_near(config: Any) -> bool:
            fields = dataclasses.asdict(config).items()
            return any(sum(parent[name] != value for name, value in fields) == 1 for parent in parents)

        near = [config for config in candidates if config not in self.tried and is_near(config)]
        return random.Random(0).sample(near, min(len(near), self.search.most + 1 - len(self.tried)))


def _run(loop: Loop, operands: Sequence[timing.Operands]) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in loop(operands)]
