"""Finished layers of a checkpoint in the making, kept beside it so that a killed run goes on where it stopped."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import jax

from checkpoints_tools.writers.leaf_files import damaged, load_leaves, save_leaves
from specmq_jax.errors import UserError
from specmq_jax.formats import Weight
from specmq_jax.kept_settings import changes, read_settings, write_settings
from specmq_jax.locks import locked
from specmq_jax.network.parameters import Formats


class KeptLayers:
    """The directory .NAME.layers beside the checkpoint NAME: what decides the layers, and a file for each.

    A context manager: while it is open, other runs are kept out.
    """

    def __init__(self, destination: pathlib.Path, settings: Mapping[str, Any], target: Formats):
        """
        Args:
          destination: of the checkpoint.
          settings: what decides the layers, JSON values.
          target: that the layers' weights are in.
        """
        absolute = destination.absolute()
        self.directory = absolute.parent / f".{absolute.name}.layers"
        self._settings, self._target, self._claim = settings, target, contextlib.ExitStack()

    def __enter__(self) -> Self:
        """
        Raises:
          UserError: layers found there were made with other settings, another run makes some, or the directory can't be
            written.
        """
        with self._claim as claim:
            with self._writing():
                self.directory.mkdir(parents=True, exist_ok=True)
            claim.enter_context(locked(
                self.directory / ".lock", f"another run is making the layers in {self.directory}; wait until it has ended, or "
                                          "give another destination"))
            self._check()
            self._claim = claim.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._claim.close()

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
        save_leaves(self._file(layer), leaves, "the layers it holds are kept, and the same command goes on behind them")

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

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.directory} can't be written: {error.strerror or error}; the layers it holds are kept, and "
                            "the same command goes on behind them") from None

    def _file(self, layer: int) -> pathlib.Path:
        return self.directory / f"layer_{layer:03}.safetensors"
