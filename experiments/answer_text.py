"""The text of an answer as its tokens come, up to where it ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specmq_jax.tokenizer import TextStream

if TYPE_CHECKING:
    from specmq_jax.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that is certain: whole characters, and no beginning of a stop string.

    Attributes:
      tokens: how many belong to the answer, a stop token and the one that completes a stop string counted.
      ended: a stop token or stop string came, and further tokens are ignored.
    """

    def __init__(self, tokenizer: "Tokenizer", stop_tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self.tokens = 0
        self.ended = False
        self._stop_tokens, self._stop_strings = frozenset(stop_tokens), tuple(stop_strings)
        self._stream, self._held = TextStream(tokenizer), ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain; a stop string, and what stands behind it, is no part of it."""
        shown = []
        for token in token_ids:
            if self.ended:
                break
            self.tokens += 1
            if token in self._stop_tokens:
                self.ended = True
                shown.append(self.rest())
            else:
                shown.append(self._certain(self._stream.add([token])))
        return "".join(shown)

    def rest(self) -> str:
        """What was held back because a stop string begins so; to be called once no token follows."""
        rest, self._held = self._held, ""
        return rest

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[:min(found)]
        begun = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - begun:]
        return text[:len(text) - begun]


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of `text` that `stop` begins with."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)
