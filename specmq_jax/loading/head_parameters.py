"""Parameters of an EAGLE head, made from an official file's tensors."""

import functools
import pathlib
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from specmq_jax.errors import UserError
from specmq_jax.formats import Range, Weight, WeightFormat, largest
from specmq_jax.loading.head_file import Tensors
from specmq_jax.loading.head_tensors import EMBED, LM_HEAD, head_tensors
from specmq_jax.loading.model import Model
from specmq_jax.network.eagle import EagleConfig, EagleHead


def head_parameters(directory: pathlib.Path, tensors: Tensors, module: EagleHead, target: Model) -> dict[str, Any]:
    """Flax parameters in the module's names from the file's, whose names, types and shapes were checked.

    Raises:
      UserError: a value that is not finite, or values outside the range of the format that they are packed in.
    """
    packer, params = _Packer(directory, tensors), {}
    for path, parts in head_tensors(module.config).items():
        names = tuple(part.name for part in parts)
        if names[0] not in tensors:
            continue  # the target lends it
        if path.endswith("/w"):
            params[path] = packer.weight(names, module.head_format if path == "lm_head/w" else module.format)
        else:
            params[path] = packer.plain(names[0], module.embed_format.dtype if path == "embed/table" else jnp.float32)
    packer.check()
    return unflatten_dict(params, sep="/") | borrowed(tensors, module.config, target)


def borrowed(names: Container[str], config: EagleConfig, target: Model) -> dict[str, Any]:
    """The target's parameters that stand in for those which the head's file lacks."""
    targets, found = target.params["params"], {}
    if EMBED not in names:
        found["embed"] = targets["embed"]
    if config.tied_head:
        found["output_table"] = targets["embed"]
    elif LM_HEAD not in names:
        found["lm_head"] = targets["lm_head"]
    return found


class _Packer:
    """Packs a file's tensors one after another, and looks at their largest magnitudes once all are on their way: asked
    earlier, each would wait for the one before it."""

    def __init__(self, directory: pathlib.Path, tensors: Tensors):
        self._directory, self._tensors = directory, tensors
        self._peaks: list[tuple[tuple[str, ...], Range, Array]] = []

    def weight(self, names: tuple[str, ...], form: WeightFormat) -> Weight:
        """A linear layer's weight of one tensor, or of several that are joined by their outputs."""
        # joined on the host: on the device the parts would lie beside the whole
        weight, peak = _packed(self._joined(names), form)
        self._peaks.append((names, form.range, peak))
        return weight

    def plain(self, name: str, dtype: Any) -> Float[Array, "..."]:
        """A tensor in that dtype."""
        values, peak = _cast(self._joined((name,)), jnp.dtype(dtype))
        self._peaks.append(((name,), Range.of(jnp.dtype(dtype)), peak))
        return values

    def check(self) -> None:
        """What was packed is finite and within its format's range, else a `UserError`."""
        found = jax.device_get([peak for *_, peak in self._peaks])
        for (names, bounds, _), peak in zip(self._peaks, found, strict=True):
            if 0 < peak < bounds.least or not peak <= bounds.most:
                self._blame(names, bounds)

    def _blame(self, names: tuple[str, ...], bounds: Range) -> None:
        wider = "" if bounds.dtype == "float32" else f"; choose another precision for the head than one of {bounds.dtype}"
        for name in names:
            values = np.abs(self._tensors[name].astype(np.float64))
            if not np.isfinite(values).all():
                raise UserError(f"{self._directory}: tensor {name} holds values that are not finite")
            if values.max() > bounds.most:
                raise UserError(f"{self._directory}: tensor {name} holds values up to {values.max():.3g}, beyond the range of "
                                f"{bounds.dtype}{wider}")
        largest = max(np.abs(self._tensors[name].astype(np.float64)).max() for name in names)
        raise UserError(f"{self._directory}: tensor {names[0]} holds values of at most {largest:.3g}, below the range of "
                        f"{bounds.dtype}{wider}")

    def _joined(self, names: tuple[str, ...]) -> Float[np.ndarray, "..."]:
        """In the file's dtype; in f32 where that is f64 or differs."""
        parts = [self._tensors[name] for name in names]
        if len({part.dtype for part in parts}) > 1 or parts[0].dtype == np.float64:
            with np.errstate(over="ignore"):
                parts = [part.astype(np.float32) for part in parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=1)
def _packed(rows: Float[Array, "N K"], form: WeightFormat) -> tuple[Weight, Float[Array, ""]]:
    return form.pack(rows.T), largest(rows)


@functools.partial(jax.jit, static_argnums=1)
def _cast(values: Float[Array, "..."], dtype: jnp.dtype) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    return values.astype(dtype), largest(values)
