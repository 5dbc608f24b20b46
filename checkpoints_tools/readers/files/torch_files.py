"""Tensors of PyTorch's pickled files (quant_model.pt, pytorch_model.bin), which are never allowed to run code."""

import pathlib
from typing import Any

import numpy as np

from checkpoints_tools.readers.files.tensor_files import TensorFiles, TensorHeader
from checkpoints_tools.readers.files.weight_files import WeightFiles
from specmq_jax.tensor_files import pickled, torch_array, torch_type


class TorchFiles(TensorFiles):
    """The tensors of a directory by name; the files are mapped, so that a tensor is in memory only when it is read.

    Raises:
      UserError: as in `tensor_files.pickled`; a tensor in two files, or not in the file where the index has it.
    """

    def __init__(self, directory: pathlib.Path, weights: WeightFiles):
        self.directory = directory
        self.files = weights.files
        self._tensors: dict[str, Any] = weights.joined({file: pickled(file, mapped=True) for file in self.files})
        self.headers = {name: TensorHeader(torch_type(tensor), tuple(tensor.shape), tensor.numel() * tensor.element_size())
                        for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return torch_array(self._tensors[name])
