"""Native checkpoints, as a source for another precision."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from checkpoints_tools.readers.base import Reader, Stored
from checkpoints_tools.readers.files.rotation_file import find_rotation
from checkpoints_tools.readers.files.weight_files import ROTATION_FILES
from checkpoints_tools.readers.hf import copy_tokenizer, find_tokenizer
from specmq_jax.formats import Dense, Int4Group, Logical
from specmq_jax.json_files import read_json
from specmq_jax.loading.checkpoint import METADATA_FILE, CheckpointReader
from specmq_jax.network.parameters import is_vector
from specmq_jax.tokenizer_files import TOKENIZER_FILES


class NativeReader(Reader):
    """A directory that `CheckpointWriter` wrote; its errors are `CheckpointReader`'s."""

    kind = "native"

    def __init__(self, directory: pathlib.Path):
        self.location = directory
        self._checkpoint = CheckpointReader(directory)
        self.config = read_json(directory / "config.json")
        self.llama = self._checkpoint.config
        self.formats = self._checkpoint.formats
        self.files = [directory / name for name in self._checkpoint.metadata["files"]]
        self.tokenizer = find_tokenizer(directory)
        self.rotation_file = find_rotation(directory)
        self.stored = {path: self._stored(path, shape) for path, shape in self._checkpoint.shapes.items()}

    def read(self, path: str) -> Logical:
        weight, shape = self._checkpoint.read(path), self._checkpoint.shapes[path]
        if isinstance(weight, jax.Array):
            return np.asarray(weight)
        if isinstance(weight, Dense):
            return np.asarray(weight.values)
        if isinstance(weight, Int4Group):
            logical = self.formats.of(path).logical(weight, shape[0])
            q, scales, order = jax.device_get((logical.q, logical.scales, logical.order))
            return dataclasses.replace(logical, q=q, scales=scales, order=order)
        return self.formats.of(path).unpack(weight, shape)

    @property
    def inputs(self) -> Sequence[pathlib.Path]:
        names = ("config.json", METADATA_FILE, *TOKENIZER_FILES, *ROTATION_FILES)
        return [*self.files, *(file for file in (self.location / name for name in names) if file.is_file())]

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        copy_tokenizer(self.location, directory)

    def digests(self) -> dict[str, str]:
        """Those of the files that the native checkpoint itself was made from."""
        return dict(self._checkpoint.metadata.get("sha256", {}))

    def _stored(self, path: str, shape: tuple[int, ...]) -> Stored:
        leaves = jax.tree.leaves(self.formats.abstract(path, shape))
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        if path == "embed/table":
            return Stored(self.formats.embed.name, nbytes)
        return Stored("fp32" if is_vector(path) else self.formats.of(path).name, nbytes)
