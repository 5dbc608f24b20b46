"""Progress of a sweep: a bar with the time left on a terminal, one plain line a cell elsewhere."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.display.cells import number
from experiments.display.lines import say
from experiments.display.time_left import Pace
from experiments.sweeping.sweep_worker import Event
from specmq_jax.words import count


@dataclasses.dataclass
class Tally:
    """How far a sweep is, and how long the rest will take at the pace so far, loading and compiling included.

    Attributes:
      waiting: questions that each cell which has not ended will still answer.
      cells: how many the sweep has.
      clock: seconds.
    """

    waiting: dict[str, int]
    cells: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._pace = Pace(clock=self.clock)

    @property
    def ended(self) -> int:
        """Cells."""
        return self.cells - len(self.waiting)

    def count(self, event: Event) -> None:
        """A question answered, or a cell that ended; a failed one leaves its other questions unanswered."""
        if event.kind == "answered":
            self._pace.count()
            self.waiting[event.cell] -= 1
        elif event.kind in ("finished", "failed"):
            self.waiting.pop(event.cell, None)

    @property
    def left(self) -> str:
        """The time left in words."""
        return self._pace.left(sum(self.waiting.values()))


class Display(Protocol):
    """Where a sweep's events are shown."""

    def show(self, event: Event) -> None: ...


@contextlib.contextmanager
def display(console: Console, waiting: Mapping[str, int], *, cells: int, done: int) -> Iterator[Display]:
    """Shows events on `console`.

    Args:
      console: a terminal gets a bar, anything else lines.
      waiting: as in `Tally`.
      cells: how many the sweep has.
      done: questions that former runs answered.
    """
    tally = Tally(waiting=dict(waiting), cells=cells)
    if not console.is_terminal:
        yield _Lines(console, tally)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("question"), MofNCompleteColumn(),
               TextColumn("{task.fields[more]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield _Bar(bars, tally, done)


class _Lines:
    def __init__(self, console: Console, tally: Tally) -> None:
        self._console, self._tally = console, tally

    def show(self, event: Event) -> None:
        self._tally.count(event)
        text = {"started": "started", "note": event.text, "finished": "done", "failed": f"failed: {event.text}"}.get(event.kind)
        if text and event.kind in ("finished", "failed"):
            text += f" ({self._tally.ended} of {count(self._tally.cells, 'cell')}, {self._tally.left})"
        if text:
            say(self._console, f"{event.cell}: {text}")


class _Bar:
    def __init__(self, bars: Progress, tally: Tally, done: int) -> None:
        self._bars, self._tally = bars, tally
        self._task = bars.add_task("", total=done + sum(tally.waiting.values()), completed=done, more="")

    def show(self, event: Event) -> None:
        before = sum(self._tally.waiting.values())
        self._tally.count(event)
        self._bars.update(self._task, advance=before - sum(self._tally.waiting.values()))
        speed = "" if event.speed is None else f"{number(event.speed, 1)} tokens/s, "
        cell = min(self._tally.ended + 1, self._tally.cells)
        self._bars.update(self._task, more=f"{speed}cell {cell} of {self._tally.cells}, {self._tally.left}")
        if event.kind in ("started", "doing"):
            self._bars.update(self._task, description=event.cell + (f": {event.text}" if event.text else ""))
        if event.kind in ("note", "failed"):
            text = f"failed: {event.text}" if event.kind == "failed" else event.text
            say(self._bars.console, f"{event.cell}: {text}", wrap=True)
