"""Quantises a model layer by layer, each for the inputs that the quantised layers before it lead to."""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools import arguments, conversion
from checkpoints_tools.quantizers.calibration import Calibration
from checkpoints_tools.quantizers.gptq import Gptq
from checkpoints_tools.quantizers.grids import grid_of
from checkpoints_tools.quantizers.kept_layers import KeptLayers
from checkpoints_tools.quantizers.smooth import Smoothing
from checkpoints_tools.quantizers.stages import LINEAR, Inputs, walk
from checkpoints_tools.readers import Reader
from specmq_jax.formats import Weight, dense_values
from specmq_jax.loading.checkpoint import CheckpointWriter
from specmq_jax.network.parameters import Formats, is_vector, parameter_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to a layer.

    Attributes:
      gptq: chooses the codes; None rounds to nearest.
      smoothing: done before that; None leaves it out.
    """

    gptq: Gptq | None = None
    smoothing: Smoothing | None = None

    def describe(self) -> dict[str, Any]:
        """As specmq.json records it."""
        smoothing = self.smoothing and {"alpha": "auto" if self.smoothing.alpha is None else self.smoothing.alpha,
                                        "inputs": list(self.smoothing.inputs)}
        return {"algorithm": "gptq" if self.gptq else "rtn", "gptq": self.gptq and dataclasses.asdict(self.gptq),
                "smoothing": smoothing}


class Quantiser:
    """Holds one layer's weights in f32, the Hessian of one linear layer, and on the host the residual stream."""

    def __init__(self, reader: Reader, target: Formats, recipe: Recipe, calibration: Calibration):
        """
        Args:
          reader: of a dense model.
          target: formats of the checkpoint.
          recipe: what is done.
          calibration: what it is done for; its ids lie in the vocabulary.
        """
        self._reader, self._target, self._recipe, self._calibration = reader, target, recipe, calibration
        self._config = reader.llama
        self._shapes = parameter_shapes(self._config)

    def write(self, destination: pathlib.Path, made: Mapping[str, Any], *, content: str, digests: Mapping[str, str]
              ) -> pathlib.Path:
        """Writes the quantised model as a native checkpoint, which it returns; a killed run's finished layers are used.

        Args:
          destination: must not exist, or be an empty directory.
          made: for specmq.json; with `content`, the calibration and the target it decides the layers.
          content: digest of all that the source's weights are made from.
          digests: of the source's files, for specmq.json.

        Raises:
          UserError: an unfinished run with other settings, another run that makes the layers, a damaged source, inputs that
            are not finite.
        """
        tokens = hashlib.sha256(np.ascontiguousarray(self._calibration.tokens)).hexdigest()[:16]
        settings = {"source content": content, **self._target.names, **made, "calibration tokens": tokens}
        with KeptLayers.opened(destination, settings, self._target) as kept:
            layers = self._config.num_layers
            with arguments.progress_bar() as progress:
                task = progress.add_task(f"{self._reader.location.name} to {self._target.linear.name}", total=layers)
                stream = self._embed()
                for layer in range(layers):
                    self._layer(layer, stream, kept)
                    progress.advance(task)
            del stream
            reader = self._reader
            with CheckpointWriter(destination, config=reader.config, formats=self._target, source=conversion.origin_of(reader),
                                  quantisation=made) as writer:
                reader.save_tokenizer(writer.directory)
                reader.save_rotation(writer.directory)
                for path, weight in self._finished(kept):
                    writer.add(path, weight)
                writer.add_digests(digests)
            kept.remove()
        return destination

    def _embed(self) -> Float[np.ndarray, "n S D"]:
        table = np.asarray(dense_values(self._reader.read("embed/table")))
        return table[self._calibration.tokens].astype(np.float32)

    def _layer(self, layer: int, stream: Float[np.ndarray, "n S D"], kept: KeptLayers) -> None:
        """Takes the stream through a layer, which is quantised on the way unless it is kept."""
        prefix, found = f"layers_{layer}/", self._kept(layer, kept)
        if found is None:
            weights = {path.removeprefix(prefix): jnp.asarray(dense_values(self._reader.read(path)), jnp.float32)
                       for path in self._shapes if path.startswith(prefix)}
            if self._recipe.smoothing:
                weights = self._recipe.smoothing.apply(self._config, weights, stream, self._target.linear)
        else:
            weights = {path.removeprefix(prefix): weight for path, weight in found.items() if is_vector(path)}
        made = {prefix + name: weight for name, weight in weights.items() if name not in LINEAR}

        def weight_for(name: str, inputs: Inputs) -> Float[Array, "K N"]:
            path = prefix + name
            made[path] = self._quantise(path, weights[name], inputs) if found is None else found[path]
            return self._target.linear.unpack(made[path], self._shapes[path])

        walk(self._config, weights, stream, weight_for)
        if found is None:
            kept.save(layer, made)

    def _quantise(self, path: str, weight: Float[Array, "K N"], inputs: Inputs) -> Weight:
        gptq = self._recipe.gptq
        if gptq is None:
            return conversion.pack(path, weight, self._target)
        hessian, count = jnp.zeros((len(weight), len(weight)), jnp.float32), 0
        for x in inputs:
            hessian, count = _add_products(hessian, x), count + len(x)
        return conversion.pack(path, gptq.quantise(weight, hessian / count, grid_of(self._target.linear)), self._target)

    def _finished(self, kept: KeptLayers) -> Iterator[tuple[str, Weight]]:
        """Each path of `parameter_shapes` with its weight."""
        for part, paths in itertools.groupby(self._shapes, key=lambda path: path.partition("/")[0]):
            if part.startswith("layers_"):
                yield from self._kept(int(part.removeprefix("layers_")), kept).items()
            else:
                yield from ((path, conversion.pack(path, self._reader.read(path), self._target)) for path in paths)

    def _kept(self, layer: int, kept: KeptLayers) -> dict[str, Weight] | None:
        prefix = f"layers_{layer}/"
        return kept.load(layer, {path: shape for path, shape in self._shapes.items() if path.startswith(prefix)})


@jax.jit
def _add_products(hessian: Float[Array, "K K"], x: Float[Array, "S K"]) -> Float[Array, "K K"]:
    return hessian + jnp.matmul(x.T, x, precision="highest")
