"""Ranks a model's tokens by their frequency in a text, for heads that score only the most frequent ones:

python -m checkpoints_tools.rank_vocabulary MODEL OUT.json --text=FILE

MODEL is a directory with a tokenizer; FILE is plain text, or JSON lines whose strings are counted wherever they stand.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from checkpoints_tools import arguments
from specmq_jax.commands import entry
from specmq_jax.decoding.drafters.vocabulary import FORMAT, rank
from specmq_jax.errors import UserError
from specmq_jax.files import put_text
from specmq_jax.network.config import LlamaConfig
from specmq_jax.tokenizer import load_tokenizer


def texts(path: pathlib.Path) -> Iterator[str]:
    """The lines of a text file, or every string in the values of a JSON-lines file.

    Raises:
      UserError: an unreadable file, or a line of a .jsonl file that is no JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if path.suffix != ".jsonl":
                    yield line
                elif line.strip():
                    try:
                        yield from _strings(json.loads(line))
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def rank_vocabulary(model: str | pathlib.Path, text: str | pathlib.Path, destination: str | pathlib.Path) -> pathlib.Path:
    """Writes the ranking of `model`'s vocabulary over `text` as JSON to `destination`, which it returns."""
    destination = pathlib.Path(destination)
    if destination.exists():
        raise UserError(f"{destination} exists already; choose another name or remove it")
    tokenizer = load_tokenizer(model)
    size = LlamaConfig.from_directory(model).vocab_size
    sequences = (tokenizer.encode(line, add_special_tokens=False) for line in texts(pathlib.Path(text)))
    ranked = rank(sequences, size)
    content = {"format": FORMAT, "vocab_size": size, "token_ids": ranked.tolist()}
    put_text(destination, json.dumps(content))
    return destination


def main(argv: Sequence[str]) -> None:
    usage = "python -m checkpoints_tools.rank_vocabulary MODEL OUT.json --text=FILE"
    model, destination = arguments.arguments(argv, usage, 2)
    if not flags.FLAGS.text:
        raise UserError(f"--text=FILE is missing; usage: {usage}")
    print(rank_vocabulary(model, flags.FLAGS.text, destination))


if __name__ == "__main__":
    flags.DEFINE_string("text", None, "Text file, or .jsonl file, whose tokens are counted.")
    entry.run(main)
