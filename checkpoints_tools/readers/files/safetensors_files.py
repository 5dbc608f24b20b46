"""Tensors of a Hugging Face directory's safetensors files, found by their headers and read one at a time."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from checkpoints_tools.readers.files.tensor_files import DTYPES, TensorFiles, TensorHeader
from checkpoints_tools.readers.files.weight_files import WeightFiles, shown
from specmq_jax.errors import UserError

_MOST_HEADER_BYTES = 100 << 20


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader(TensorHeader):
    """Also where a tensor lies: `offset` counts bytes from the file's start."""

    file: pathlib.Path
    offset: int


class SafetensorsFiles(TensorFiles):
    """The tensors of a directory by name.

    Raises:
      UserError: a truncated or malformed file, a tensor in two files, or not in the file where the index has it.
    """

    headers: dict[str, SafetensorsHeader]

    def __init__(self, directory: pathlib.Path, weights: WeightFiles):
        self.directory = directory
        self.files = weights.files
        self.headers = weights.joined({file: read_header(file) for file in self.files})

    def read(self, name: str) -> np.ndarray:
        """One tensor. It is read, not mapped, so that a large model's pages do not stay resident."""
        header = self.headers[name]
        count = math.prod(header.shape)
        try:
            values = np.fromfile(header.file, DTYPES[header.type], count, offset=header.offset)
        except OSError as error:
            raise UserError(f"tensor {name} of {header.file} can't be read: {error.strerror}") from None
        if values.size != count:
            raise UserError(f"{header.file} has become shorter while it was read")
        return values.reshape(header.shape)


def read_header(path: pathlib.Path) -> dict[str, SafetensorsHeader]:
    """The header of each tensor of a file.

    Raises:
      UserError: the file can't be read, or its header is not as the format has it: names with a type, a shape and a place
        each, which together fill the file from the header's end to its own.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise UserError(f"{path} is damaged, truncated or not safetensors: it has {size} bytes, its header asks for "
                                f"{length + 8}")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unrepeated)
        if not isinstance(entries, dict) or not isinstance(entries.pop("__metadata__", {}), dict):
            raise _Malformed("it is not an object")
        headers = {name: _tensor_header(path, 8 + length, name, entry) for name, entry in entries.items()}
        end = _end_of_data([(header.offset - 8 - length, header.nbytes, name) for name, header in headers.items()])
    except _Malformed as fault:
        raise UserError(f"{path} is damaged or not safetensors: its header is not valid, {fault}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged or not safetensors: its header is not valid JSON") from None
    if size != 8 + length + end:
        raise UserError(f"{path} is truncated or damaged: it has {size} bytes, expected {8 + length + end}")
    return headers


class _Malformed(Exception):
    """What is wrong with a header."""


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Malformed(f"it has {shown(name)} twice")
        found[name] = value
    return found


def _tensor_header(path: pathlib.Path, data: int, name: str, entry: Any) -> SafetensorsHeader:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(place) or len(place) != 2 or place[0] > place[1]:
        raise _Malformed(f"{shown(name)} lacks a dtype, a shape or data_offsets")
    begin, end = place
    header = SafetensorsHeader(dtype, tuple(shape), end - begin, path, data + begin)
    if dtype in DTYPES and header.nbytes != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _Malformed(f"the data_offsets of {shown(name)} do not fit its shape")
    return header


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _end_of_data(places: list[tuple[int, int, str]]) -> int:
    """Where the last tensor ends; they lie one behind the other."""
    end = 0
    for begin, nbytes, name in sorted(places):
        if begin != end:
            raise _Malformed(f"{shown(name)} begins at byte {begin} of the data, and the tensor before it ends at {end}")
        end += nbytes
    return end
