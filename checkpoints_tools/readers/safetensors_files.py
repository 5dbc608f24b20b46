"""Tensors of a Hugging Face directory's safetensors files, found by their headers and read one at a time."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from checkpoints_tools.readers.tensor_files import DTYPES, TensorFiles, TensorHeader, indexed_files
from specmq_jax.errors import UserError

_PREFERRED = ("model.safetensors", "model_gptq.safetensors")
_MOST_HEADER_BYTES = 100 << 20


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader(TensorHeader):
    """Also where a tensor lies: `offset` counts bytes from the file's start."""

    file: pathlib.Path
    offset: int


class SafetensorsFiles(TensorFiles):
    """The tensors of a directory by name.

    Raises:
      UserError: no safetensors file, several without an index, a missing, truncated or malformed one.
    """

    headers: dict[str, SafetensorsHeader]

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.files = _weight_files(directory)
        self.headers = {}
        for file in self.files:
            self.headers |= _read_header(file)

    def read(self, name: str) -> np.ndarray:
        """One tensor. It is read, not mapped, so that a large model's pages do not stay resident."""
        header = self.headers[name]
        try:
            values = np.fromfile(header.file, DTYPES[header.type], math.prod(header.shape), offset=header.offset)
        except OSError as error:
            raise UserError(f"tensor {name} of {header.file} can't be read: {error.strerror}") from None
        return values.reshape(header.shape)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return indexed_files(indices[0])
    files = sorted(directory.glob("*.safetensors"))
    for name in _PREFERRED:
        if directory / name in files:
            return [directory / name]
    if len(files) > 1:
        raise UserError(f"{directory} holds {len(files)} safetensors files and no model.safetensors.index.json to say what "
                        "belongs together")
    if not files:
        raise UserError(f"{directory} holds no weights: no *.safetensors file, quant_model.pt or pytorch_model.bin")
    return files


def _read_header(path: pathlib.Path) -> dict[str, SafetensorsHeader]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise UserError(f"{path} is truncated or not safetensors: it has {size} bytes, its header asks for "
                                f"{length + 8}")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        headers = {name: _tensor_header(path, 8 + length, entry) for name, entry in entries.items()}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is damaged or not safetensors: its header is not valid") from None
    if size != expected:
        raise UserError(f"{path} is truncated or damaged: it has {size} bytes, expected {expected}")
    return headers


def _tensor_header(path: pathlib.Path, data: int, entry: dict[str, Any]) -> SafetensorsHeader:
    begin, end = entry["data_offsets"]
    header = SafetensorsHeader(entry["dtype"], tuple(entry["shape"]), end - begin, path, data + begin)
    if header.type in DTYPES and header.nbytes != math.prod(header.shape) * DTYPES[header.type].itemsize:
        raise ValueError("offsets do not fit the shape")
    return header
