"""Tensors of a Hugging Face directory's safetensors files, found by their headers and read one at a time."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from specmq_jax.config import read_json
from specmq_jax.errors import UserError

_INDEX = "model.safetensors.index.json"
_MOST_HEADER_BYTES = 100 << 20
_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
           "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies: `type` is safetensors' name of its dtype, `offset` counts bytes from the file's start."""

    file: pathlib.Path
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFiles:
    """The tensors of a directory by name.

    Raises:
      UserError: no safetensors file, several without an index, a missing, truncated or malformed one.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.files = _weight_files(directory)
        self.headers: dict[str, TensorHeader] = {}
        for file in self.files:
            self.headers |= _read_header(file)

    def header(self, name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> TensorHeader:
        """The header of a tensor that must have this shape and one of these types, else a `UserError`."""
        if name not in self.headers:
            raise UserError(f"{self.directory} lacks the tensor {name}")
        found = self.headers[name]
        if found.shape != shape:
            raise UserError(f"tensor {name} has shape {list(found.shape)}; config.json asks for {list(shape)}")
        if found.type not in types:
            raise UserError(f"tensor {name} has type {found.type}; expected {' or '.join(types)}")
        return found

    def read(self, name: str) -> np.ndarray:
        """One tensor. It is read, not mapped, so that a large model's pages do not stay resident."""
        header = self.headers[name]
        try:
            values = np.fromfile(header.file, _DTYPES[header.type], math.prod(header.shape), offset=header.offset)
        except OSError as error:
            raise UserError(f"tensor {name} of {header.file} can't be read: {error.strerror}") from None
        return values.reshape(header.shape)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / _INDEX).exists():
        weight_map = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{directory / _INDEX} has no weight_map")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing; {_INDEX} names it")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if directory / "model.safetensors" in files:
        return [directory / "model.safetensors"]
    if len(files) > 1:
        raise UserError(f"{directory} holds {len(files)} safetensors files and no {_INDEX} to say what belongs together")
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickled:
            raise UserError(f"{directory} holds pickled weights ({pickled[0]}), which are not read because they can run "
                            "code; save the model as safetensors")
        raise UserError(f"{directory} holds no weights: no *.safetensors file")
    return files


def _read_header(path: pathlib.Path) -> dict[str, TensorHeader]:
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


def _tensor_header(path: pathlib.Path, data: int, entry: dict[str, Any]) -> TensorHeader:
    begin, end = entry["data_offsets"]
    header = TensorHeader(path, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)
    if header.type in _DTYPES and header.nbytes != math.prod(header.shape) * _DTYPES[header.type].itemsize:
        raise ValueError("offsets do not fit the shape")
    return header
