"""Texts as token sequences of one length, for calibrating quantisers and for perplexity."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from checkpoints_tools import records
from checkpoints_tools.readers.base import sha256
from checkpoints_tools.records import Record, is_text
from specmq_jax import tokenizer as tk
from specmq_jax.errors import UserError
from specmq_jax.loading.model import check_tokens
from specmq_jax.network.config import LlamaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a quantiser looks at.

    Attributes:
      tokens: i32[count, length].
      name: of the file they came from.
      sha256: of that file.
    """

    tokens: Int32[np.ndarray, "n S"]
    name: str
    sha256: str

    def describe(self) -> dict[str, Any]:
        """As specmq.json records it."""
        count, length = self.tokens.shape
        return {"file": self.name, "sha256": self.sha256, "sequences": count, "length": length, "tokens": count * length}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationFile:
    """A text to calibrate with.

    Attributes:
      path: of a file that `read_tokens` reads.
      length: tokens of a sequence; None for 2048, or the model's positions if those are fewer.
      count: sequences at the most, spread evenly over the text.
    """

    path: pathlib.Path
    length: int | None = None
    count: int = 128

    def read(self, tokenizer: "Tokenizer", config: LlamaConfig) -> Calibration:
        """The sequences for a model.

        Raises:
          UserError: what `read_tokens` finds wrong, a length above the model's positions, a text that fills no sequence, or
            a tokenizer that is another model's.
        """
        length = self.length or min(2048, config.max_position)
        if length > config.max_position:
            raise UserError(f"sequences of {length} tokens are longer than the model's {config.max_position} positions; choose "
                            "a smaller --calibration_length")
        stream = check_tokens(read_tokens(self.path, tokenizer), config)
        windows = len(stream) // length
        if not windows:
            raise UserError(f"{self.path} has {len(stream)} tokens, which fill no sequence of {length}; give a longer text or "
                            "a smaller --calibration_length")
        chosen = np.arange(min(self.count, windows)) * windows // min(self.count, windows)
        tokens = stream[:windows * length].reshape(windows, length)[chosen]
        return Calibration(tokens=tokens, name=self.path.name, sha256=sha256(self.path))


def read_tokens(path: pathlib.Path, tokenizer: "Tokenizer") -> Int32[np.ndarray, "n"]:
    """All tokens of a text: of a .jsonl file's documents one behind the other, of any other file as one document.

    A line is {"text": text}, tokenised as it is, or {"turns": [text, ...]} as in MT-Bench's questions, of which every turn is
    put into the chat template as a user's message. A document begins with a BOS where the tokenizer itself puts one.

    Raises:
      UserError: a file that is missing, unreadable, empty or no text, or a line of another form; the line is named.
    """
    if path.suffix == ".jsonl":
        documents = [document for record in records.read(path, "text file") for document in _documents(record, tokenizer)]
    else:
        text = records.read_text(path, "text file")
        documents = [_encode(tokenizer, text)] if text.strip() else []
    if not documents:
        raise UserError(f"the text file {path} is empty")
    return np.concatenate([np.asarray(document, np.int32) for document in documents])


def _documents(record: Record, tokenizer: "Tokenizer") -> list[list[int]]:
    text, turns = (record.values.get(key) for key in ("text", "turns"))
    if is_text(text):
        return [_encode(tokenizer, text)]
    if isinstance(turns, list) and turns and all(map(is_text, turns)):
        return [tk.encode_chat(tokenizer, [{"role": "user", "content": turn}]) for turn in turns]
    raise UserError(f'{record.place}: expected {{"text": text}} or {{"turns": [text, ...]}}, none of them empty')


def _encode(tokenizer: "Tokenizer", text: str) -> list[int]:
    return tokenizer.encode(text, verbose=False)  # else it warns of a text longer than the model's positions
