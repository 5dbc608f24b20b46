"""The part of a sweep that runs on one loaded target: its cells, one after another, of which none ends the others."""

import contextlib
import dataclasses
import gc
import traceback
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import jax
from rich.console import Console

import specmq_jax as sm
from experiments.answers.answer_files import Answer
from experiments.benchmarks.benchmark import Bench
from experiments.running import methods, runner
from experiments.running.contents import Contents
from experiments.running.progress import Reporter
from experiments.running.settings import Settings
from experiments.sweeping.isolated import Tell
from experiments.sweeping.sweep_cells import Cell
from specmq_jax.errors import UserError
from specmq_jax.files import put_text
from specmq_jax.loading.memory import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a cell.

    Attributes:
      cell: its name.
      kind: "failed" and "finished" end it; a "note" is to be read after the run, too.
      text: what goes on, what is noted, or why it failed, in one line.
      speed: tokens/s of the question answered; None where it has none.
    """

    cell: str
    kind: Literal["started", "doing", "note", "answered", "finished", "failed"]
    text: str = ""
    speed: float | None = None


class Shared(Protocol):
    """What the cells of one target share."""

    def load(self, settings: Settings) -> Bench:
        """A bench with the settings' drafters over the target."""

    def plan(self, settings: Settings, needed: Sequence[str]) -> Plan:
        """The device memory that a cell takes beside what earlier ones left there."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SharingBench(methods.Workbench):
    """A bench over the target and the small model of another, with drafters of its own."""

    first: methods.Workbench

    @property
    def small_model(self) -> sm.Model:
        return self.first.small_model


class LoadedModels:
    """A target and a small model, loaded when the first cell needs them."""

    def __init__(self) -> None:
        self._first: methods.Workbench | None = None
        self._drafting = False

    def load(self, settings: Settings) -> methods.Workbench:
        """Cells must agree in everything that decides these two models."""
        if self._first is None:
            self._first = runner.load(settings)
        self._drafting |= any(methods.METHODS[method].small_model for method in settings.methods)
        return SharingBench(target=self._first.target, models=settings.models, tokenizer=self._first.tokenizer,
                            config=self._first.config, first=self._first)

    def plan(self, settings: Settings, needed: Sequence[str]) -> Plan:
        """What is on the device already counts as 0 bytes."""
        held = {"target": 0} if self._first is not None else {}
        if self._drafting:
            held |= {"draft model": 0}
        return Plan({**runner.plan(settings, needed).parts, **held})


def run_cells(cells: Sequence[Cell], tell: Tell, shared: Shared | None = None) -> None:
    """Runs cells of one target and precision, and tells what happens to each as an `Event`.

    A cell that fails leaves its answers so far, and the traceback of a fault beside them; the next ones run all the same.
    """
    shared, contents = shared or LoadedModels(), Contents()
    for cell in cells:
        tell(Event(cell=cell.name, kind="started"))
        show = _Showing(cell.name, tell)

        def plan(settings: Settings, needed: Sequence[str], show: _Showing = show) -> Plan:
            memory = shared.plan(settings, needed)
            show.note(memory.describe())
            return memory

        try:
            runner.run(cell.settings, load=shared.load, plan=plan, console=Console(quiet=True), show=show,
                       contents=contents)
        except UserError as error:
            tell(Event(cell=cell.name, kind="failed", text=str(error)))
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            tell(Event(cell=cell.name, kind="failed", text=f"{type(error).__name__}: {line} ({_keep_traceback(cell)})"))
        else:
            cell.traceback.unlink(missing_ok=True)
            tell(Event(cell=cell.name, kind="finished"))
        jax.clear_caches()  # jitted functions hold their decoders, and these the heads of a cell that is over
        gc.collect()


def _keep_traceback(cell: Cell) -> str:
    """Writes the traceback of the error that is being handled, and says where it is."""
    try:
        put_text(cell.traceback, traceback.format_exc())
    except UserError as error:
        return f"its traceback is lost: {error}"
    return f"traceback in {cell.traceback}"


class _Showing:
    """Shows a method's progress as events."""

    def __init__(self, cell: str, tell: Tell) -> None:
        self._cell, self._tell = cell, tell

    @contextlib.contextmanager
    def __call__(self, console: Console, method: str, *, total: int, done: int) -> Iterator[Reporter]:
        del console, method, total, done
        yield self

    def doing(self, what: str) -> None:
        self._tell(Event(cell=self._cell, kind="doing", text=what))

    def note(self, text: str) -> None:
        self._tell(Event(cell=self._cell, kind="note", text=text))

    def answered(self, answer: Answer) -> None:
        self._tell(Event(cell=self._cell, kind="answered", speed=answer.speed))
