"""The tensors of an official EAGLE head's files, by name."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.tensor_files import DTYPES, pickled, safetensors, torch_array, torch_type

FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = {"d2t": ("I64", "I32", "I16"), "t2d": ("BOOL", "U8", "I8", "I32", "I64")}
_PLAIN, _PICKLED = "model.safetensors", "pytorch_model.bin"

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Header:
    """A tensor's shape, and safetensors' name of its dtype."""

    shape: tuple[int, ...]
    type: str


Headers = Mapping[str, Header]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadFiles:
    """A head's one file, or the files that its index names.

    Attributes:
      directory: where they lie.
      headers: of all tensors.
    """

    directory: pathlib.Path
    headers: Headers
    _files: tuple[pathlib.Path, ...]
    _pickled: Tensors | None

    @classmethod
    def open(cls, directory: pathlib.Path) -> "HeadFiles":
        """Reads the headers, of a pickle everything; a missing, damaged or unsafe file is a `UserError`."""
        files, index = _find(directory)
        headers: dict[str, Header] = {}
        pickled: dict[str, np.ndarray] | None = None
        places: dict[str, pathlib.Path] = {}
        for file in files:
            if file.suffix == ".bin":
                found, values = _unpickled(file)
                pickled = {**(pickled or {}), **values}
            else:
                found = _headers(file)
            for name in found.keys() & headers.keys():
                raise UserError(f"{directory} holds tensor {name} twice, in {places[name].name} and in {file.name}")
            headers |= found
            places |= dict.fromkeys(found, file)
        if index:
            _check_index(index, places)
        return cls(directory=directory, headers=headers, _files=files, _pickled=pickled)

    def read(self) -> Tensors:
        """Every tensor's values, in the file's dtype."""
        if self._pickled is not None:
            return self._pickled
        tensors: dict[str, np.ndarray] = {}
        for path in self._files:
            with safetensors(path) as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        return tensors


def check_types(directory: pathlib.Path, headers: Headers) -> None:
    """A tensor that has no elements, or that is neither floats nor, as a map of tokens, integers is a `UserError`."""
    for name, header in headers.items():
        expected = _INTEGERS.get(name, FLOATS)
        if header.type not in expected:
            raise UserError(f"{directory}: tensor {name} has type {header.type}; expected {' or '.join(expected)}")
        if 0 in header.shape:
            raise UserError(f"{directory}: tensor {name} is empty, of shape {list(header.shape)}")


def _find(directory: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], pathlib.Path | None]:
    """The files, and the index that names them."""
    if not directory.is_dir():
        raise UserError(f"{directory} {'is a file' if directory.exists() else 'does not exist'}; expected the directory of "
                        "an EAGLE head")
    for name in (_PLAIN, _PICKLED):
        file, index = directory / name, directory / f"{name}.index.json"
        if file.is_file() and index.is_file() and _indexed(index) != (file,):
            raise UserError(f"{directory} holds {name} and an index of other files, {index.name}; remove one of the two")
        if file.is_file():
            return (file,), None
        if index.is_file():
            return _indexed(index), index
    raise UserError(f"{directory} holds neither {_PLAIN} nor {_PICKLED}")


def _indexed(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The files that an index names."""
    names = read_json(index).get("weight_map")
    ending = index.name.removesuffix(".index.json").rpartition(".")[2]
    if not isinstance(names, dict) or not names or not all(
            isinstance(name, str) and name == pathlib.PurePath(name).name and name.endswith(f".{ending}")
            for name in names.values()):
        raise UserError(f"{index} must hold a weight_map from the names of tensors to *.{ending} files beside it")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; {index.name} names it")
    return files


def _check_index(index: pathlib.Path, places: Mapping[str, pathlib.Path]) -> None:
    """The index and the files name the same tensors at the same places."""
    wanted = read_json(index)["weight_map"]
    for name in sorted(wanted.keys() | places.keys()):
        found = places[name].name if name in places else "none"
        if found != wanted.get(name, "none"):
            raise UserError(f"{index} places tensor {name} in file {wanted.get(name, 'none')}; it is in {found}")


def _headers(path: pathlib.Path) -> Headers:
    with safetensors(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def _unpickled(path: pathlib.Path) -> tuple[Headers, Tensors]:
    """What a pickle holds; of types that are refused only the headers."""
    loaded = pickled(path)
    headers = {name: Header(tuple(value.shape), torch_type(value)) for name, value in loaded.items()}
    return headers, {name: torch_array(loaded[name]) for name, header in headers.items() if header.type in DTYPES}
