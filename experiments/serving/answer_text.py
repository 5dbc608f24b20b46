"""The text of an answer as its tokens come, up to where it ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specmq_jax.tokenizer import TextStream

if TYPE_CHECKING:
    from specmq_jax.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that is certain: whole characters, and no beginning of a stop string.

    The stop string that is complete first ends the answer; of several that end at one letter, the longest. Where it ends does
    not depend on how the text is cut into tokens. An empty stop string ends nothing.

    Attributes:
      tokens: how many belong to the answer, a stop token and the one that completes a stop string counted.
      ended: a stop token or stop string came, and further tokens are ignored.
    """

    def __init__(self, tokenizer: "Tokenizer", stop_tokens: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self.tokens = 0
        self.ended = False
        self._stop_tokens = frozenset(stop_tokens)
        self._searches = [_Search(wanted) for wanted in stop_strings if wanted]
        self._stream, self._held, self._closed = TextStream(tokenizer), "", False

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
        """What was held back, because a stop string begins so or a character is not whole; to be called once no token
        follows."""
        if self._closed:
            return ""
        shown = self._certain(self._stream.rest())
        rest, self._held, self._closed = self._held, "", True
        return shown + rest

    def _certain(self, text: str) -> str:
        if not self._searches:
            return text
        start, self._held = len(self._held), self._held + text
        for end, letter in enumerate(text, start=start + 1):
            found = [len(search.wanted) for search in self._searches if search.add(letter)]
            if found:
                shown, self._held = self._held[:end - max(found)], ""
                self.ended = self._closed = True
                return shown
        certain = len(self._held) - max(search.matched for search in self._searches)
        shown, self._held = self._held[:certain], self._held[certain:]
        return shown


class _Search:
    """Knuth, Morris and Pratt's search for a string in letters that come one by one.

    Attributes:
      wanted: the string, not empty.
      matched: letters of the longest end of the text that it begins with.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted, self.matched = wanted, 0
        self._borders = [0]

    def add(self, letter: str) -> bool:
        """Whether the text ends with the string."""
        if self.matched == len(self.wanted):
            self.matched = self._border(self.matched)
        while self.matched and letter != self.wanted[self.matched]:
            self.matched = self._border(self.matched)
        self.matched += letter == self.wanted[self.matched]
        return self.matched == len(self.wanted)

    def _border(self, length: int) -> int:
        """The longest end of the first `length` letters that they begin with, shorter than they are; found when asked for."""
        while len(self._borders) < length:
            border, letter = self._borders[-1], self.wanted[len(self._borders)]
            while border and letter != self.wanted[border]:
                border = self._borders[border - 1]
            self._borders.append(border + (letter == self.wanted[border]))
        return self._borders[length - 1]
