"""The text of token ids that come one after another: what is certain at once, and in the end all that decoding them gives."""

import codecs
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder
    from transformers import PreTrainedTokenizerFast as Tokenizer

_BEFORE = "x"
"""Stands for the text so far where tokens are decoded that begin no text."""
_PER_TOKEN = ("Replace", "Metaspace", "WordPiece", "ByteFallback")
"""Decoders that turn each token into text by itself, but for the first, and for bytes in a row."""


class TextStream:
    """Decodes an answer as its tokens come, without special tokens.

    All that `add` gave out and then `rest`, joined, is what `decode` gives for the tokens in one piece. Text that a later token
    may change is held back: bytes that are no whole character and, where a tokenizer falls back to bytes, all bytes in a row.
    A decoder whose text is certain only at the end has all of it held back.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        backend = tokenizer.backend_tokenizer
        self._spelling = backend.id_to_token
        self._left_out = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        self._text = _text(backend.decoder)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; ids that the tokenizer doesn't know have none."""
        tokens = (self._spelling(int(token)) for token in token_ids)
        return "".join(self._text.add(token) for token in tokens if token is not None and token not in self._left_out)

    def rest(self) -> str:
        """What was held back, to be called once no token follows; a broken character is U+FFFD."""
        return self._text.rest()


class _Text(Protocol):
    def add(self, token: str) -> str: ...

    def rest(self) -> str: ...


class _Bytes:
    """Tokens that spell bytes of UTF-8, a letter for each."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: str) -> str:
        letters = _byte_letters()
        try:
            spelled = bytes(letters[letter] for letter in token)
        except KeyError:  # an added token is written as it is
            spelled = token.encode()
        return self._decoder.decode(spelled)

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Pieces:
    """Tokens whose text is the same whatever follows, but for bytes in a row, of which the last is not known."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode, self._held, self._begun = decode, list[str](), False

    def add(self, token: str) -> str:
        self._held.append(token)
        return "" if token.startswith("<0x") and token.endswith(">") else self.rest()

    def rest(self) -> str:
        if self._begun:
            text = self._decode([_BEFORE, *self._held])[len(_BEFORE):]
        elif not (text := self._decode(self._held)):
            return ""  # what is left out at the beginning of a text may reach into the next token
        self._held, self._begun = [], True
        return text


class _Whole:
    """Tokens whose text is certain once all are there."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode, self._held = decode, list[str]()

    def add(self, token: str) -> str:
        self._held.append(token)
        return ""

    def rest(self) -> str:
        held, self._held = self._held, []
        return self._decode(held) if held else ""


def _text(decoder: "Decoder | None") -> _Text:
    if decoder is None:
        return _Pieces(" ".join)
    steps = _steps(json.loads(decoder.__getstate__()))
    if [step["type"] for step in steps] in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _Bytes()
    if _is_local(steps) and decoder.decode([_BEFORE]) == _BEFORE:
        return _Pieces(decoder.decode)
    return _Whole(decoder.decode)


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _is_local(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a token changes no text before it, and is changed by that only where there is none or bytes are in a row."""
    fused = False
    for step in steps:
        if step["type"] == "Fuse":
            fused = True
        elif step["type"] == "Strip":  # once fused, it takes from both ends of the whole text
            if fused and step["stop"]:
                return False
        elif fused or step["type"] not in _PER_TOKEN:
            return False
    return True


@functools.cache
def _byte_letters() -> Mapping[str, int]:
    """The byte that each letter of a byte-level vocabulary spells, as GPT-2's `bytes_to_unicode` has it.

    Bytes that Latin-1 prints are their own letters; the others follow in order from U+0100 on.
    """
    printed = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return MappingProxyType({chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)})
