"""An answer on the terminal as it comes: drafts in another shade, speed and accept length below; elsewhere plain text."""

import time
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from experiments.answers import metrics
from experiments.display.cells import number
from specmq_jax.words import count

OWN_STYLE, DRAFT_STYLE, FIGURES_STYLE = "default", "cyan", "dim"


class AnswerView:
    """Shows one answer; a context manager.

    Off a terminal the text alone goes to `console`, and the figures to `aside` once it has ended.
    """

    def __init__(self, console: Console, aside: Console) -> None:
        """Nothing is shown before the first token."""
        self._console, self._aside = console, aside
        self._live = Live(console=console, refresh_per_second=12, transient=True) if console.is_terminal else None
        self._line = Text()
        self._tokens, self._rounds, self._seconds, self._shown = 0, 0, 0.0, time.perf_counter()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
            self._console.print(self._line)
        else:
            self._console.print()
        if self._tokens:
            self._aside.print(Text(self.figures, style=FIGURES_STYLE), soft_wrap=True)

    def committed(self, tokens: int) -> None:
        """A round committed so many tokens; the first is drawn with the prompt and belongs to none."""
        if self._tokens:
            self._seconds, self._rounds = self._seconds + time.perf_counter() - self._shown, self._rounds + 1
        self._tokens += tokens
        self._update()
        self._shown = time.perf_counter()

    def add(self, text: str, *, drafted: bool) -> None:
        """More of the answer; `drafted` says that the drafter found it and the model only agreed."""
        if not self._live:
            self._console.print(Text(text), end="", soft_wrap=True)
            self._shown = time.perf_counter()
            return
        self._line.append(text, style=DRAFT_STYLE if drafted else OWN_STYLE)
        # full rows leave the live part, which has to fit on the screen
        *rows, self._line = self._line.wrap(self._console, self._console.width)
        for row in rows:
            self._live.console.print(row)
        self._update()
        self._shown = time.perf_counter()

    @property
    def figures(self) -> str:
        """Tokens, the speed that `metrics.speed` makes of them and of the time spent waiting for rounds, and tokens a round."""
        parts, made = [count(self._tokens, "token")], metrics.speed([self._tokens], [self._seconds])
        if made is not None:
            parts.append(f"{number(made, 1)} tokens/s")
        if self._rounds:
            parts.append(f"accept length {number((self._tokens - 1) / self._rounds, 2)}")
        return ", ".join(parts)

    def _update(self) -> None:
        if self._live:
            self._live.update(Group(self._line, Text(self.figures, style=FIGURES_STYLE)))
