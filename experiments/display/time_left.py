"""The time left of something that is done piece by piece, in words."""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass
class Pace:
    """How long pieces took since this was made.

    Attributes:
      clock: seconds.
    """

    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start, self._done = self.clock(), 0

    def count(self) -> None:
        """One piece more is done."""
        self._done += 1

    def left(self, remaining: int) -> str:
        """The time that so many pieces will take at the pace so far."""
        if not remaining:
            return "none left"
        if not self._done:
            return "time left unknown"
        seconds = (self.clock() - self._start) / self._done * remaining
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
