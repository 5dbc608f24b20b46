"""Tensors of PyTorch's pickled files (quant_model.pt, pytorch_model.bin), which are never allowed to run code."""

import pathlib
from typing import Any

import numpy as np

from checkpoints_tools.readers.files.tensor_files import DTYPES, TensorFiles, TensorHeader
from checkpoints_tools.readers.files.weight_files import WeightFiles
from specmq_jax.errors import UserError

_BFLOAT16 = DTYPES["BF16"]
_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


class TorchFiles(TensorFiles):
    """The tensors of a directory by name; the files are mapped, so that a tensor is in memory only when it is read.

    Raises:
      UserError: PyTorch is not installed; a damaged file, or one that holds more than tensors; a tensor in two files, or not in
        the file where the index has it.
    """

    def __init__(self, directory: pathlib.Path, weights: WeightFiles):
        self.directory = directory
        self.files = weights.files
        self._tensors: dict[str, Any] = weights.joined({file: _load(file) for file in self.files})
        self.headers = {name: _header(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return _array(self._tensors[name])


def load_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of one file by name; one that is there by itself has the file's name. Errors as of `TorchFiles`."""
    return {name: _array(tensor) for name, tensor in _load(file, alone=True).items()}


def _load(file: pathlib.Path, *, alone: bool = False) -> dict[str, Any]:
    """The tensors of a file, mapped; `alone` also lets it hold one tensor without a name."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} needs PyTorch: pip install 'specmq-jax[torch]', or save the model as safetensors") from None
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        if isinstance(error, PermissionError):
            raise
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{file} can't be loaded as plain tensors, and nothing else is loaded because a pickle can run code: "
                        f"{reason.splitlines()[0][:160]}") from None
    if alone and isinstance(loaded, torch.Tensor):
        loaded = {file.stem: loaded}
    if not isinstance(loaded, dict) or not all(_is_plain(key, value) for key, value in loaded.items()):
        raise UserError(f"{file} can't be loaded as plain tensors: expected names with a tensor each")
    return loaded


def _is_plain(key: Any, value: Any) -> bool:
    import torch

    return (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_quantized)


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(_BFLOAT16).copy()
    return tensor.numpy().copy()


def _header(tensor: Any) -> TensorHeader:
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorHeader(_TYPES.get(name, name), tuple(tensor.shape), tensor.numel() * tensor.element_size())
