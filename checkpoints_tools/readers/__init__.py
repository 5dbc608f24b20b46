"""Readers of foreign checkpoints; `open_source` finds the one that fits."""

import pathlib
import sys

from checkpoints_tools.readers import hub
from checkpoints_tools.readers.base import Reader, Stored
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.gguf.reader import GgufReader
from checkpoints_tools.readers.hf import HuggingFaceReader, open_tensors
from checkpoints_tools.readers.native import NativeReader
from checkpoints_tools.readers.quantised.compressed_tensors import open_compressed
from checkpoints_tools.readers.quantised.gptq import AUTO_ROUND, GptqReader
from checkpoints_tools.readers.quantised.marlin import MarlinReader, is_marlin
from checkpoints_tools.readers.quantised.qqq import QqqReader
from checkpoints_tools.readers.quantised.qserve import QoqReader, QServeInt8Reader
from checkpoints_tools.readers.quantised.settings import as_object
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.loading import checkpoint

_METHODS = ("gptq", *AUTO_ROUND, "qqq", "compressed-tensors")
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
        reader = _open_path(path)
        for note in reader.notes:
            print(f"notice: {note}", file=sys.stderr)
        return reader
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
    """By config.json's quantization_config, or quantize_config.json beside it; without either by the tensors' names."""
    config = read_json(path / "config.json")
    quantisation = None
    for key in ("quantization_config", "compression_config"):
        quantisation = quantisation or as_object(f"{path / 'config.json'} has a {key} that", config.get(key))
    if not quantisation and (path / "quantize_config.json").is_file():
        quantisation = read_json(path / "quantize_config.json")
    tensors = open_tensors(path, config.get("transformers_weights"))
    if not quantisation:
        return _open_by_names(path, tensors)
    method = quantisation.get("quant_method") or quantisation.get("method") or "gptq"
    if method not in _METHODS:
        raise UserError(f"{path} is quantised by {method!r}; read are 'gptq', 'auto-round', 'qqq' and 'compressed-tensors', "
                        "and QServe's files")
    if quantisation.get("method") not in (None, method):
        raise UserError(f"{path} has quant_method {method!r} and method {quantisation['method']!r}; expected the same in both")
    if method == "gptq" and is_marlin(tensors):
        return MarlinReader(path, quantisation, tensors)
    if method in ("gptq", *AUTO_ROUND):
        return GptqReader(path, quantisation, tensors)
    if method == "qqq":
        return QqqReader(path, quantisation, tensors)
    return open_compressed(path, quantisation, tensors)


def _open_by_names(path: pathlib.Path, tensors: TensorFiles) -> Reader:
    parts = {name.rpartition(".")[2] for name in tensors.headers}
    if "dequant_scale" in parts:
        return QServeInt8Reader(path, tensors)
    if {"qweight", "s1_scales"} <= parts:
        return QoqReader(path, tensors)
    if unknown := parts & {"qweight", "B", "weight_packed", "weight_scale"}:
        raise UserError(f"{path} holds quantised weights ({unknown.pop()}), and config.json has no quantization_config that "
                        "says how they were made")
    return HuggingFaceReader(path, tensors)
