"""The file of a rotation: the orthogonal matrix Q that took a model's residual stream x to x Q."""

import math
import pathlib
from collections.abc import Collection

import numpy as np
from jaxtyping import Float

from checkpoints_tools.readers.files.weight_files import ROTATION_FILES
from checkpoints_tools.writers.shards import save_tensors
from specmq_jax.errors import UserError
from specmq_jax.formats import peak
from specmq_jax.tensor_files import DTYPES, pickled, safetensors, torch_array
from specmq_jax.words import count

_FILE = "rotation.safetensors"
_NAME = "rotation"
_PICKLED = (".pth", ".pt", ".bin")
_TOLERANCE = 1e-2
"""Half precision, in which some toolkits keep the matrix, moves a vector's length by up to 0.4 %."""


def find_rotation(directory: pathlib.Path) -> pathlib.Path | None:
    """The file that holds the directory's rotation, None without one."""
    return next((directory / name for name in ROTATION_FILES if (directory / name).is_file()), None)


def load_rotation(source: str | pathlib.Path, size: int | None = None) -> Float[np.ndarray, "D D"]:
    """The matrix, f32[D, D].

    Args:
      source: a .pth, .pt or .bin file (needs the extra `torch`; no code is run), a .safetensors file, or a directory that
        holds one under the name `rotation`, a native checkpoint's for one.
      size: that D has to be, where it is known.

    Raises:
      UserError: nothing there, a damaged or unsafe file, a matrix that is not square, not of that size or not orthogonal.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        found = find_rotation(path)
        if found is None:
            raise UserError(f"{path} holds no rotation (rotation.safetensors, .pth, .pt or .bin): it is not rotated, or its "
                            "toolkit keeps the matrix elsewhere; name that file")
        path = found
    elif not path.exists():
        raise UserError(f"{path} does not exist; expected a rotation's file, or the directory that holds it")
    rotation = _read_matrix(path)
    check_rotation(rotation, str(path), size)
    return rotation.astype(np.float32)


def save_rotation(directory: pathlib.Path, rotation: Float[np.ndarray, "D D"]) -> None:
    """Puts the matrix, in f32, where `load_rotation` finds it in a checkpoint's directory."""
    save_tensors(directory / _FILE, {_NAME: np.asarray(rotation, np.float32)})


def check_rotation(rotation: np.ndarray, name: str, size: int | None = None) -> None:
    """A matrix that is not square, not of that size or not orthogonal is a `UserError` that begins with `name`."""
    if rotation.ndim != 2 or rotation.shape[0] != rotation.shape[1]:
        raise UserError(f"{name} has shape {list(rotation.shape)}; a rotation is a square matrix")
    if not math.isfinite(peak(rotation)):
        raise UserError(f"{name} holds values that are not finite; it is not orthogonal, so it is no rotation")
    if size is not None and len(rotation) != size:
        raise UserError(f"{name} rotates {len(rotation)} dimensions; this model's hidden states have {size}")
    # random vectors that come back through the transpose: the product of the whole matrices would take minutes at D = 8192
    vectors = np.random.default_rng(0).standard_normal((8, len(rotation)))
    returned = (vectors @ rotation.astype(np.float64)) @ rotation.T.astype(np.float64)
    if not np.linalg.norm(returned - vectors) < _TOLERANCE * np.linalg.norm(vectors):
        raise UserError(f"{name} is not orthogonal, so it is no rotation; it is damaged, or something else")


def _read_matrix(path: pathlib.Path) -> np.ndarray:
    if path.suffix in _PICKLED:
        tensors = pickled(path, mapped=True, alone=True)
        return torch_array(tensors[_only_name(path, tensors)])
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no rotation's file: expected the ending .safetensors, {', '.join(_PICKLED)}")
    with safetensors(path) as file:
        name = _only_name(path, file.keys())
        kind = file.get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(f"{path} has type {kind}; expected one of {', '.join(DTYPES)}")
        return file.get_tensor(name)


def _only_name(path: pathlib.Path, tensors: Collection[str]) -> str:
    if _NAME not in tensors and len(tensors) != 1:
        raise UserError(f"{path} holds {count(len(tensors), 'tensor')}; expected one, or one of the name {_NAME!r}")
    return _NAME if _NAME in tensors else next(iter(tensors))
