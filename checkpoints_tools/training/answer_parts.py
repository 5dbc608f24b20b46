"""Files of answers in a training's answer store: some hundred answers each, written at once."""

import pathlib
import re
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from specmq_jax.errors import UserError
from specmq_jax.files import written

Row = tuple[int, int, int, Int32[np.ndarray, "n"]]
"""Dialogue, turn, prompt length and all tokens of an answer."""

_NAME = re.compile(r"part_(\d+)\.npz")


def find_parts(directory: pathlib.Path) -> list[pathlib.Path]:
    """The parts in a directory, in the order in which they were written."""
    return sorted((path for path in directory.glob("part_*.npz") if _NAME.fullmatch(path.name)), key=_number)


def next_part(directory: pathlib.Path, parts: Sequence[pathlib.Path]) -> pathlib.Path:
    """The path behind the last of `parts`, of which some may have been removed."""
    return directory / f"part_{_number(parts[-1]) + 1 if parts else 0:05}.npz"


def read_part(path: pathlib.Path) -> list[Row]:
    """The answers of a part.

    Raises:
      UserError: it is damaged.
    """
    try:
        with np.load(path) as part:
            dialogues, turns, prompts, lengths, tokens = (
                _whole_numbers(part[key]) for key in ("dialogues", "turns", "prompts", "lengths", "tokens"))
        if not len(dialogues) == len(turns) == len(prompts) == len(lengths) or lengths.sum() != len(tokens):
            raise ValueError("its arrays have other lengths than they tell")
        if (prompts >= lengths).any():
            raise ValueError("an answer is empty")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}); remove it, and the same command makes its answers again") from None
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    return list(zip(dialogues.tolist(), turns.tolist(), prompts.tolist(), rows, strict=True))


def write_part(path: pathlib.Path, rows: Sequence[Row], advice: str) -> None:
    """Writes a part, whole or not at all; errors and `advice` as in `files.written`."""
    dialogues, turns, prompts, tokens = zip(*rows, strict=True)
    with written(path, advice=advice) as partial, partial.open("wb") as file:
        np.savez_compressed(file, dialogues=np.int32(dialogues), turns=np.int32(turns), prompts=np.int32(prompts),
                            lengths=np.int32([len(row) for row in tokens]), tokens=np.concatenate(tokens))


def _number(path: pathlib.Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _whole_numbers(values: np.ndarray) -> Int32[np.ndarray, "n"]:
    if values.ndim != 1 or values.dtype != np.int32 or (values < 0).any():
        raise ValueError("an array holds other values than whole numbers")
    return values
