"""Writes safetensors files as transformers' `save_pretrained` names them, holding one file's tensors at a time."""

import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from checkpoints_tools.writers.arrays import contiguous
from specmq_jax.files import put_json

_INDEX = "model.safetensors.index.json"


def save_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file, which everybody may read (the library lets its owner alone) and PyTorch's programs accept."""
    save_file({name: contiguous(values) for name, values in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


class ShardWriter:
    """model.safetensors, or model-00001-of-0000N.safetensors and so on with an index, in a directory."""

    def __init__(self, directory: pathlib.Path, shard_bytes: int):
        """
        Args:
          directory: there already.
          shard_bytes: a file holds no more, unless one tensor alone does.
        """
        self._directory, self._shard_bytes = directory, shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._files: list[tuple[pathlib.Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes the next tensor; a file is written whenever one is full."""
        held = sum(values.nbytes for values in self._pending.values())
        if self._pending and held + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = contiguous(tensor)
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes what is left, and gives the files their names, which hold their number."""
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for i, (file, names) in enumerate(self._files, start=1):
            final = f"model-{i:05}-of-{len(self._files):05}.safetensors"
            file.rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        put_json(self._directory / _INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _flush(self) -> None:
        file = self._directory / f"shard-{len(self._files) + 1:05}.safetensors"
        save_tensors(file, self._pending)
        self._files.append((file, list(self._pending)))
        self._pending = {}
