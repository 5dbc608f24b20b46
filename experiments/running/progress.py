"""Progress of a run: a bar with the time left on a terminal, one plain line a question elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.answers.answer_files import Answer
from experiments.display.cells import number
from experiments.display.lines import say
from experiments.display.time_left import Pace

ANSWERING = "answering"
"""What goes on while questions are answered: the time left is reckoned from there on, behind the compiling."""


class Reporter(Protocol):
    """Where a method tells how far it is."""

    def doing(self, what: str) -> None:
        """What goes on now, for example "compiling"."""

    def note(self, text: str) -> None:
        """Something to be read after the run, too."""

    def answered(self, answer: Answer) -> None:
        """One question more is done."""


@contextlib.contextmanager
def progress(console: Console, method: str, *, total: int, done: int) -> Iterator[Reporter]:
    """Reports `method` on `console`; `done` of its `total` questions were answered before."""
    if not console.is_terminal:
        yield _Lines(console, method, total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("question"), MofNCompleteColumn(),
               TextColumn("{task.fields[more]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield _Bar(bars, method, total, done)


def speed(answer: Answer) -> str:
    """An answer's tokens/s, or nothing where it has no speed."""
    return "" if answer.speed is None else f"{number(answer.speed, 1)} tokens/s"


class _Lines:
    def __init__(self, console: Console, method: str, total: int, done: int) -> None:
        self._console, self._method, self._total, self._done = console, method, total, done
        self._pace = Pace()

    def doing(self, what: str) -> None:
        if what == ANSWERING:
            self._pace = Pace()
        self.note(what)

    def note(self, text: str) -> None:
        say(self._console, f"{self._method}: {text}")

    def answered(self, answer: Answer) -> None:
        self._done += 1
        self._pace.count()
        left = self._pace.left(self._total - self._done) if self._done < self._total else ""
        parts = [f"question {self._done} of {self._total} ({answer.category})", speed(answer), left]
        self.note(", ".join(filter(None, parts)))


class _Bar:
    def __init__(self, bars: Progress, method: str, total: int, done: int) -> None:
        self._bars, self._method, self._total, self._done = bars, method, total, done
        self._pace = Pace()
        self._task = bars.add_task(method, total=total, completed=done, more="")

    def doing(self, what: str) -> None:
        if what == ANSWERING:
            self._pace = Pace()
        self._bars.update(self._task, description=f"{self._method}: {what}")

    def note(self, text: str) -> None:
        say(self._bars.console, f"{self._method}: {text}", wrap=True)

    def answered(self, answer: Answer) -> None:
        self._done += 1
        self._pace.count()
        parts = [speed(answer), self._pace.left(self._total - self._done)]
        self._bars.update(self._task, advance=1, more=", ".join(filter(None, parts)))
