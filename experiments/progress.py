"""Progress of a run: a bar on a terminal, one plain line a question elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.answers import Answer


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
               TextColumn("{task.fields[speed]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield _Bar(bars, method, total, done)


class _Lines:
    def __init__(self, console: Console, method: str, total: int, done: int) -> None:
        self._console, self._method, self._total, self._done = console, method, total, done

    def doing(self, what: str) -> None:
        self.note(what)

    def note(self, text: str) -> None:
        self._console.print(f"{self._method}: {text}", highlight=False, markup=False, soft_wrap=True)

    def answered(self, answer: Answer) -> None:
        self._done += 1
        self.note(f"question {self._done} of {self._total} ({answer.category}), {answer.speed:.1f} tokens/s")


class _Bar:
    def __init__(self, bars: Progress, method: str, total: int, done: int) -> None:
        self._bars, self._method = bars, method
        self._task = bars.add_task(method, total=total, completed=done, speed="")

    def doing(self, what: str) -> None:
        self._bars.update(self._task, description=f"{self._method}: {what}")

    def note(self, text: str) -> None:
        self._bars.console.print(f"{self._method}: {text}", highlight=False, markup=False)

    def answered(self, answer: Answer) -> None:
        self._bars.update(self._task, advance=1, speed=f"{answer.speed:.1f} tokens/s")
