"""Files that hold tensors by name, opened so that none of them runs code: safetensors, and PyTorch's pickles."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from specmq_jax.errors import UserError

DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
"""NumPy's dtypes by safetensors' names."""
_TYPES = {dtype.name: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def safetensors(path: pathlib.Path) -> Iterator[Any]:
    """The library's handle of a file, which has checked that the header describes the file as a whole.

    Raises:
      UserError: the file can't be read, or is damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{path} is damaged, truncated or not safetensors: it has {path.stat().st_size} bytes ({reason})"
                        ) from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None


def pickled(path: pathlib.Path, *, mapped: bool = False, alone: bool = False) -> dict[str, Any]:
    """PyTorch's tensors of a pickle, on the host.

    Args:
      path: of the file.
      mapped: a tensor is in memory only when it is read; files of PyTorch before 1.6 can't be mapped.
      alone: it may hold one tensor without a name, which then gets the file's.

    Raises:
      UserError: PyTorch is not installed; a damaged file, or one that holds more than plain tensors with names.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch: pip install 'specmq-jax[torch]', or save it as safetensors") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path} can't be loaded as plain tensors, and nothing else is loaded because a pickle can run code: "
                        f"{reason.splitlines()[0][:160]}") from None
    if alone and isinstance(loaded, torch.Tensor):
        loaded = {path.stem: loaded}
    if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_quantized for name, value in loaded.items()):
        raise UserError(f"{path} can't be loaded as plain tensors: expected names with a tensor each")
    return loaded


def torch_type(tensor: Any) -> str:
    """Safetensors' name of a PyTorch tensor's dtype, or PyTorch's own where `DTYPES` lacks it."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _TYPES.get(name, name)


def torch_array(tensor: Any) -> np.ndarray:
    """A copy of a PyTorch tensor."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which PyTorch does not hand to NumPy
        return tensor.contiguous().view(torch.int16).numpy().view(DTYPES["BF16"]).copy()
    return tensor.numpy().copy()
