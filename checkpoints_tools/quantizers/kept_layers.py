"""Finished layers of a checkpoint in the making, kept beside it so that a killed run goes on where it stopped."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax

from checkpoints_tools.writers.leaf_files import damaged, load_leaves, save_leaves
from specmq_jax.errors import UserError
from specmq_jax.formats import Weight
from specmq_jax.kept_settings import changes, read_settings, write_settings
from specmq_jax.locks import claimed
from specmq_jax.network.parameters import Formats

_GOES_ON = "the layers it holds are kept, and the same command goes on behind them"


class KeptLayers:
    """The directory .NAME.layers beside the checkpoint NAME: what decides the layers, and a file for each."""

    def __init__(self, directory: pathlib.Path, settings: Mapping[str, Any], target: Formats):
        """Changes nothing on the disk; arguments as in `opened`, but for the directory of the layers itself."""
        self.directory, self._settings, self._target = directory, settings, target

    @classmethod
    @contextlib.contextmanager
    def opened(cls, destination: pathlib.Path, settings: Mapping[str, Any], target: Formats) -> Iterator[Self]:
        """The layers of a checkpoint in the making; other runs are kept out of them while the context lasts.

        Args:
          destination: of the checkpoint.
          settings: what decides the layers, JSON values.
          target: that the layers' weights are in.

        Raises:
          UserError: layers found there were made with other settings, another run makes some, or the directory can't be
            written.
        """
        absolute = destination.absolute()
        directory = absolute.parent / f".{absolute.name}.layers"
        with claimed(directory, ".lock", "another run is making the layers", "give another destination"):
            kept = cls(directory, settings, target)
            kept._check()
            yield kept

    def _check(self) -> None:
        path = self.directory / "settings.json"
        before = read_settings(path, f"give another destination, or remove {self.directory}")
        if before is None and any(self.directory.glob("layer_*.safetensors")):
            raise UserError(f"{self.directory} holds layers, and {path.name}, which tells how they were made, is missing; give "
                            "another destination, or remove it")
        if before is None:
            write_settings(path, self._settings)
        elif found := changes(before, self._settings):
            raise UserError(f"{self.directory} holds layers of an unfinished run with other settings ({'; '.join(found)}); "
                            "give the same ones to go on with it, give another destination, or remove it")

    def save(self, layer: int, weights: Mapping[str, Weight]) -> None:
        """Keeps a layer's weights, by their names in `parameter_shapes`."""
        leaves = {f"{path}#{i}": leaf for path, weight in weights.items() for i, leaf in enumerate(jax.tree.leaves(weight))}
        save_leaves(self._file(layer), leaves, _GOES_ON)

    def load(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight] | None:
        """A layer's weights at the paths of `shapes`; None where it has not been kept.

        Raises:
          UserError: the file is damaged.
        """
        file = self._file(layer)
        if not file.exists():
            return None
        weights = {}
        try:
            leaves = load_leaves(file)
            with damaged(file):
                for path, shape in shapes.items():
                    expected, structure = jax.tree.flatten(self._target.abstract(path, shape))
                    found = [leaves[f"{path}#{i}"] for i in range(len(expected))]
                    if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(found, expected, strict=True)):
                        raise KeyError(path)
                    weights[path] = jax.tree.unflatten(structure, found)
        except UserError as error:
            raise UserError(f"{error}; remove it, and the same command makes it again") from None
        return weights

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, layer: int) -> pathlib.Path:
        return self.directory / f"layer_{layer:03}.safetensors"
