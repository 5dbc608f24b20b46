"""Readers of foreign checkpoints; `open_source` finds the one that fits."""

import pathlib

from checkpoints_tools.readers import hub
from checkpoints_tools.readers.base import Reader, Stored
from checkpoints_tools.readers.gguf import GgufReader
from checkpoints_tools.readers.gptq import GptqReader
from checkpoints_tools.readers.hf import HuggingFaceReader
from checkpoints_tools.readers.native import NativeReader
from specmq_jax import checkpoint
from specmq_jax.config import read_json
from specmq_jax.errors import UserError

__all__ = ["Reader", "Stored", "open_source"]


def open_source(source: str | pathlib.Path) -> Reader:
    """A reader for a directory, a GGUF file or a hub name, chosen by what is there.

    Every header is read and checked: tensors' names, shapes and types, and the files' sizes.

    Raises:
      UserError: nothing there, nothing recognised, or something damaged.
    """
    path = pathlib.Path(source)
    if not path.exists():
        if not hub.is_hub_name(str(source)):
            raise UserError(f"{source} does not exist")
        path = hub.download(str(source))
    try:
        return _open_path(path)
    except PermissionError as error:
        raise UserError(f"{error.filename} can't be read: permission denied") from None


def _open_path(path: pathlib.Path) -> Reader:
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return GgufReader(path)
        raise UserError(f"{path} is not a GGUF file (it begins with {magic!r}); give a checkpoint's directory or a GGUF")
    if checkpoint.is_native(path):
        return NativeReader(path)
    if (path / "config.json").is_file():
        return _quantised_or_dense(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_path(ggufs[0])
    if ggufs:
        raise UserError(f"{path} holds {len(ggufs)} GGUF files; name one of them: {', '.join(g.name for g in ggufs)}")
    if not any(path.iterdir()):
        raise UserError(f"{path} is empty")
    raise UserError(f"{path} holds no checkpoint: neither config.json nor a *.gguf file nor {checkpoint.METADATA_FILE}")


def _quantised_or_dense(path: pathlib.Path) -> Reader:
    quantisation = read_json(path / "config.json").get("quantization_config")
    if quantisation is None and (path / "quantize_config.json").is_file():
        quantisation = read_json(path / "quantize_config.json")
    if quantisation is None:
        return HuggingFaceReader(path)
    method = quantisation.get("quant_method") or quantisation.get("method") or "gptq"
    if method != "gptq":
        raise UserError(f"{path} is quantised by {method!r}; only 'gptq' is read")
    return GptqReader(path, quantisation)
