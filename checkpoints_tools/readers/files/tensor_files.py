"""Tensors of a Hugging Face directory by name, whatever kind of file holds them."""

import abc
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from specmq_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """A tensor's shape, its bytes, and safetensors' name of its dtype."""

    type: str
    shape: tuple[int, ...]
    nbytes: int


class TensorFiles(abc.ABC):
    """The tensors of a directory by name, one read at a time.

    Attributes:
      files: that hold them.
      headers: known without reading a tensor's values.
    """

    directory: pathlib.Path
    files: Sequence[pathlib.Path]
    headers: dict[str, TensorHeader]

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor."""

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
