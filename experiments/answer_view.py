"""An answer on the terminal as it comes: drafts in another shade, speed and accept length below; elsewhere plain text."""

import time
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

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
        self._tokens, self._rounds, self._start = 0, 0, time.perf_counter()

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
        if not self._tokens:
            self._start = time.perf_counter()
        else:
            self._rounds += 1
        self._tokens += tokens
        self._update()

    def add(self, text: str, *, drafted: bool) -> None:
        """More of the answer; `drafted` says that the drafter found it and the model only agreed."""
        if not self._live:
            self._console.print(Text(text), end="", soft_wrap=True)
            return
        self._line.append(text, style=DRAFT_STYLE if drafted else OWN_STYLE)
        # full rows leave the live part, which has to fit on the screen
        *rows, self._line = self._line.wrap(self._console, self._console.width)
        for row in rows:
            self._live.console.print(row)
        self._update()

    @property
    def figures(self) -> str:
        """Tokens, speed behind the first token, and tokens a round."""
        parts = [f"{self._tokens} token{'s' if self._tokens > 1 else ''}"]
        if self._rounds:
            made = self._tokens - 1
            parts += [f"{made / (time.perf_counter() - self._start):.1f} tokens/s", f"accept length {made / self._rounds:.2f}"]
        return ", ".join(parts)

    def _update(self) -> None:
        if self._live:
            self._live.update(Group(self._line, Text(self.figures, style=FIGURES_STYLE)))
