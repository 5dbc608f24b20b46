"""Finished layers of a checkpoint in the making, kept beside it so that a killed run goes on where it stopped."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from specmq_jax.config import read_json
from specmq_jax.errors import UserError
from specmq_jax.files import put_json, written
from specmq_jax.formats import Weight
from specmq_jax.parameters import Formats


class KeptLayers:
    """The directory .NAME.layers beside the checkpoint NAME: what decides the layers, and a file for each."""

    def __init__(self, destination: pathlib.Path, settings: Mapping[str, Any], target: Formats):
        """
        Args:
          destination: of the checkpoint.
          settings: what decides the layers, JSON values.
          target: that the layers' weights are in.

        Raises:
          UserError: layers found there were made with other settings, or the directory can't be written.
        """
        absolute = destination.absolute()
        self.directory = absolute.parent / f".{absolute.name}.layers"
        self._target = target
        self._check(json.loads(json.dumps(settings)))

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.directory / "settings.json"
        if path.exists():
            before = read_json(path)
            changed = [f"{key} {before.get(key)!r} there and {settings.get(key)!r} here"
                       for key in dict.fromkeys([*before, *settings]) if before.get(key) != settings.get(key)]
            if changed:
                raise UserError(f"{self.directory} holds layers of an unfinished run with other settings "
                                f"({'; '.join(changed)}); give the same ones to go on with it, give another destination, or "
                                "remove it")
            return
        put_json(path, settings, parents=True)

    def save(self, layer: int, weights: Mapping[str, Weight]) -> None:
        """Keeps a layer's weights, by their names in `parameter_shapes`."""
        leaves = {f"{path}#{i}": leaf for path, weight in weights.items() for i, leaf in enumerate(jax.tree.leaves(weight))}
        advice = "the layers it holds are kept, and the same command goes on behind them"
        with written(self._file(layer), advice=advice) as partial:
            save_file(leaves, partial)

    def load(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight] | None:
        """A layer's weights at the paths of `shapes`; None where it has not been kept.

        Raises:
          UserError: the file is damaged.
        """
        if not self._file(layer).exists():
            return None
        weights = {}
        try:
            leaves = load_file(self._file(layer))
            for path, shape in shapes.items():
                expected, structure = jax.tree.flatten(self._target.abstract(path, shape))
                found = [leaves[f"{path}#{i}"] for i in range(len(expected))]
                if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(found, expected, strict=True)):
                    raise KeyError(path)
                weights[path] = jax.tree.unflatten(structure, found)
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{self._file(layer)} is damaged ({error}); remove it, and the same command makes it again"
                            ) from None
        return weights

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, layer: int) -> pathlib.Path:
        return self.directory / f"layer_{layer:03}.safetensors"
