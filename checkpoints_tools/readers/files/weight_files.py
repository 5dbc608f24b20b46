"""Which files of a directory hold its weights: transformers' rule first, then the names that toolkits give."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json

ROTATION_FILES = ("rotation.safetensors", "rotation.pth", "rotation.pt", "rotation.bin")
_INDEX_ENDING = ".index.json"
_TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json")
_TOOLKITS = ("model_gptq.safetensors", "quant_model.pt")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NAMED = (*_TRANSFORMERS, *_TOOLKITS, *_PICKLED)
"""A whole file comes before an index, and safetensors before pickled files, of which a toolkit's own comes first."""
_MOST_NAME_BYTES = 255
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The files that hold a directory's weights, and where an index lists them, the index and each tensor's file in it."""

    files: tuple[pathlib.Path, ...]
    index: pathlib.Path | None = None
    file_of: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

    def joined(self, held: Mapping[pathlib.Path, Mapping[str, _T]]) -> dict[str, _T]:
        """Each tensor of all files, from what each file holds.

        Raises:
          UserError: a tensor that two files hold, or that is not in the file where the index has it.
        """
        found: dict[str, _T] = {}
        owner: dict[str, pathlib.Path] = {}
        for file, tensors in held.items():
            for name in tensors.keys() & found.keys():
                raise UserError(f"tensor {shown(name)} stands in two files, {owner[name].name} and {file.name}; expected "
                                "one")
            found |= tensors
            owner |= dict.fromkeys(tensors, file)
        for name, file in self.file_of.items():
            if owner.get(name) != file:
                raise UserError(f"{self.index} says that {file.name} holds the tensor {shown(name)}, which it does not")
        return found


def find_weight_files(directory: pathlib.Path, named: str | None = None) -> WeightFiles:
    """The files that hold a directory's weights; `named` is the one that config.json names, if it does.

    Raises:
      UserError: none, several of which it is unclear which one is meant, an index that is malformed, or that names a file
        which is missing or lies elsewhere.
    """
    if named is not None:
        check_file_name(named, f"transformers_weights of {directory / 'config.json'}")
    for name in _NAMED if named is None else (named,):
        if (directory / name).is_file():
            return _opened(directory / name)
    if named is not None:
        raise UserError(f"{directory / named} is missing; transformers_weights in config.json names it")
    return _only(directory)


def check_file_name(name: object, where: str) -> None:
    """Refuses what is not the plain name of a file beside the one that names it."""
    plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")
    if not plain or len(name.encode()) > _MOST_NAME_BYTES:
        raise UserError(f"{where} names the file {shown(repr(name))}; expected the name of a file in the same directory")


def shown(text: str) -> str:
    """A text of the user's as it may stand in a line."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _only(directory: pathlib.Path) -> WeightFiles:
    """The only file of its kind in a directory without one of a known name."""
    indices = sorted(directory.glob(f"*.safetensors{_INDEX_ENDING}"))
    if len(indices) == 1:
        return _opened(indices[0])
    files = _without_rotation(directory.glob("*.safetensors"))
    if len(indices) > 1:
        raise UserError(f"{directory} holds {len(indices)} indices ({', '.join(index.name for index in indices)}); expected "
                        "one, or one of the name model.safetensors.index.json")
    if len(files) > 1:
        raise UserError(f"{directory} holds {len(files)} safetensors files and no model.safetensors.index.json to say what "
                        "belongs together")
    pickled = _without_rotation(file for pattern in ("*.bin", "*.pt") for file in directory.glob(pattern))
    if not files and len(pickled) > 1:
        raise UserError(f"{directory} holds {len(pickled)} pickled files ({', '.join(file.name for file in pickled)}); "
                        "expected one, or one of the name quant_model.pt or pytorch_model.bin")
    if not files and not pickled:
        raise UserError(f"{directory} holds no weights: no *.safetensors file, quant_model.pt or pytorch_model.bin")
    return WeightFiles((files or pickled)[0:1])


def _without_rotation(files: Iterable[pathlib.Path]) -> tuple[pathlib.Path, ...]:
    return tuple(sorted(file for file in files if file.is_file() and file.name not in ROTATION_FILES))


def _opened(path: pathlib.Path) -> WeightFiles:
    if not path.name.endswith(_INDEX_ENDING):
        return WeightFiles((path,))
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; expected an object with the file of each tensor")
    for name in weight_map.values():
        check_file_name(name, str(path))
    files = {name: path.parent / name for name in sorted(set(weight_map.values()))}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file} is missing; {path.name} names it")
    return WeightFiles(tuple(files.values()), path, {tensor: files[name] for tensor, name in weight_map.items()})
