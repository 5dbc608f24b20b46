"""Tensors of a Hugging Face directory's safetensors files, found by their headers and read one at a time."""

import dataclasses
import math
import pathlib

import numpy as np

from checkpoints_tools.readers.files.tensor_files import TensorFiles, TensorHeader
from checkpoints_tools.readers.files.weight_files import WeightFiles
from specmq_jax.tensor_files import DTYPES, safetensors


@dataclasses.dataclass(frozen=True)
class SafetensorsHeader(TensorHeader):
    """Also the file that holds a tensor."""

    file: pathlib.Path


class SafetensorsFiles(TensorFiles):
    """The tensors of a directory by name.

    Raises:
      UserError: a truncated or malformed file, a tensor in two files, or not in the file where the index has it.
    """

    headers: dict[str, SafetensorsHeader]

    def __init__(self, directory: pathlib.Path, weights: WeightFiles):
        self.directory = directory
        self.files = weights.files
        self.headers = weights.joined({file: _headers(file) for file in self.files})

    def read(self, name: str) -> np.ndarray:
        """One tensor. Its file is mapped while it is copied, so that a large model's pages do not stay resident."""
        with safetensors(self.headers[name].file) as file:
            return file.get_tensor(name)


def _headers(path: pathlib.Path) -> dict[str, SafetensorsHeader]:
    with safetensors(path) as file:
        parts = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}
    # what NumPy has no type for is refused where it is asked for
    return {name: SafetensorsHeader(kind, shape, math.prod(shape) * (DTYPES[kind].itemsize if kind in DTYPES else 0), path)
            for name, (kind, shape) in parts.items()}
