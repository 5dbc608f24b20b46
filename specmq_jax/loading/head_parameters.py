"""Parameters of an EAGLE head, made from an official file's tensors."""

import functools
import pathlib
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specmq_jax.errors import UserError
from specmq_jax.formats import Range, Weight, WeightFormat, largest
from specmq_jax.loading.head_file import Tensors
from specmq_jax.loading.model import Model
from specmq_jax.network.eagle import EagleConfig, EagleHead


def head_parameters(directory: pathlib.Path, tensors: Tensors, module: EagleHead, target: Model) -> dict[str, Any]:
    """Flax parameters in the module's names from the file's, whose names, types and shapes were checked.

    Raises:
      UserError: a value that is not finite, or values outside the range of the format that they are packed in.
    """
    config, packer = module.config, _Packer(directory, tensors)
    linear, scale = functools.partial(packer.weight, form=module.format), packer.scale

    def layer(prefix: str) -> dict[str, Any]:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return {"attention": {"qkv": linear(*(f"{attention}{p}_proj.weight" for p in "qkv")),
                              "o": linear(f"{attention}o_proj.weight")},
                "mlp_norm": scale(f"{prefix}post_attention_layernorm.weight"),
                "mlp": {"gate_up": linear(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
                        "down": linear(f"{mlp}down_proj.weight")}}

    params = {"fc": linear("fc.weight"), **layer("midlayer." if config.version == 3 else "layers.0.")}
    if config.bias:
        params["fc_bias"] = packer.plain("fc.bias", jnp.float32)
    if config.rotated:
        params["rotation"] = linear("rms_norm_rotation.weight")
    for i in range(1, config.layer.num_layers):
        name = f"layers.{i}."
        params[f"layers_{i - 1}"] = {**layer(name), "attention_norm": scale(f"{name}input_layernorm.weight")}
    if config.version == 3:
        params |= {"embed_norm": scale("midlayer.input_layernorm.weight"), "norm": scale("norm.weight"),
                   "state_norm": scale("midlayer.hidden_norm.weight")}
    if "embed_tokens.weight" in tensors:
        params["embed"] = {"table": packer.plain("embed_tokens.weight", module.embed_format.dtype)}
    if "lm_head.weight" in tensors:
        params["lm_head"] = packer.weight("lm_head.weight", form=module.head_format)
    packer.check()
    return params | borrowed(tensors, config, target)


def borrowed(names: Container[str], config: EagleConfig, target: Model) -> dict[str, Any]:
    """The target's parameters that stand in for those which the head's file lacks."""
    targets, found = target.params["params"], {}
    if "embed_tokens.weight" not in names:
        found["embed"] = targets["embed"]
    if config.tied_head:
        found["output_table"] = targets["embed"]
    elif "lm_head.weight" not in names:
        found["lm_head"] = targets["lm_head"]
    return found


class _Packer:
    """Packs a file's tensors one after another, and looks at their largest magnitudes once all are on their way: asked
    earlier, each would wait for the one before it."""

    def __init__(self, directory: pathlib.Path, tensors: Tensors):
        self._directory, self._tensors = directory, tensors
        self._peaks: list[tuple[tuple[str, ...], Range, Array]] = []

    def weight(self, *names: str, form: WeightFormat) -> dict[str, Weight]:
        """A linear layer's weight of one tensor, or of several that are joined by their outputs."""
        # joined on the host: on the device the parts would lie beside the whole
        weight, peak = _packed(self._joined(names), form)
        self._peaks.append((names, form.range, peak))
        return {"w": weight}

    def scale(self, name: str) -> dict[str, Float[Array, "D"]]:
        return {"scale": self.plain(name, jnp.float32)}

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
