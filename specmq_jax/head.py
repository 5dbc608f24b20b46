"""An EAGLE head ready to draft for a target, and the reading of official head files."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from specmq_jax import formats
from specmq_jax.cache import KVCache
from specmq_jax.config import LlamaConfig, read_json
from specmq_jax.eagle import EagleConfig, EagleHead, eagle_config
from specmq_jax.errors import UserError
from specmq_jax.formats import Dense, DenseFormat, WeightFormat
from specmq_jax.model import Model

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """What `load_head` returns.

    Attributes:
      config: sizes.
      module: the functional module.
      params: {"head": Flax variables, "ids": i32[V_draft] target id of each draft id, or None where they are equal}.
        Tables that the head's file lacks are the target's own arrays.
      capture: target layers whose entering streams it reads; empty for the final states.
    """

    config: EagleConfig
    module: EagleHead
    params: Any
    capture: tuple[int, ...]

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that drafting one level reads: all but the embedding."""
        tree = self.params["head"]["params"]
        return sum(leaf.nbytes for name, part in tree.items() if name != "embed" for leaf in jax.tree.leaves(part))

    def new_cache(self, max_len: int) -> KVCache:
        """An empty cache of `max_len` rows."""
        return KVCache.create(self.config.layer, max_len, self.module.format.dtype)

    def check(self, target: LlamaConfig) -> None:
        """Raises a `UserError` where the head was made for a target of other sizes."""
        if not all(0 <= layer < target.num_layers for layer in self.capture):
            raise UserError(f"an EAGLE-3 head reads the target's layers {self.capture}; this target has "
                            f"{target.num_layers}, at least 4 are needed")
        width = target.hidden_size * max(1, len(self.capture))
        if self.config.feature_size != width or self.config.vocab_size != target.vocab_size:
            raise UserError(f"the EAGLE head reads states of width {self.config.feature_size} over a vocabulary of "
                            f"{self.config.vocab_size}; this target gives {width} over {target.vocab_size}")


def load_head(directory: str | pathlib.Path, target: Model, *, precision: str | None = None) -> Head:
    """Loads an official EAGLE-1, -2 or -3 head for a target.

    Args:
      directory: config.json with model.safetensors, or pytorch_model.bin (needs the extra `torch`).
      target: whose embedding and lm_head are used where the file has none.
      precision: of the head's weights; by default dense in the target's activation dtype.

    Raises:
      UserError: a missing or damaged file, or a head made for another target.
    """
    directory = pathlib.Path(directory)
    tensors = _read_tensors(directory)
    if "fc.weight" not in tensors:
        raise UserError(f"{directory} holds no EAGLE head: tensor fc.weight is missing")
    config = eagle_config(read_json(directory / "config.json"), {k: v.shape for k, v in tensors.items()}, target.config)
    dense = next(f for name in ("fp32", "bf16", "fp16") if (f := formats.get(name)).dtype == target.module.format.dtype)
    linear = formats.get(precision) if precision else dense
    head_format = dense if "lm_head.weight" in tensors else target.module.head_format
    module = EagleHead(config, linear, head_format, target.module.embed_format)
    head = Head(config=config, module=module, capture=config.capture(target.config.num_layers),
                params={"head": {"params": _parameters(directory, tensors, config, linear, dense, target)},
                        "ids": _target_ids(tensors)})
    head.check(target.config)
    return head


def _target_ids(tensors: Tensors) -> jax.Array | None:
    if "d2t" not in tensors:
        return None
    offsets = tensors["d2t"].astype(np.int64)
    return jnp.asarray(np.arange(len(offsets)) + offsets, jnp.int32)


def _parameters(directory: pathlib.Path, tensors: Tensors, config: EagleConfig, linear: WeightFormat,
                dense: DenseFormat, target: Model) -> dict[str, Any]:
    """Flax parameters in the module's names from the file's."""
    prefix = "midlayer." if config.version == 3 else "layers.0."

    def tensor(name: str) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{directory}: tensor {name} is missing from the EAGLE head")
        return tensors[name]

    def weight(*names: str) -> dict[str, Any]:
        return {"w": linear.pack(jnp.concatenate([jnp.asarray(tensor(name)).T for name in names], axis=1))}

    def scale(name: str) -> dict[str, Any]:
        return {"scale": jnp.asarray(tensor(name), jnp.float32)}

    def layer(prefix: str) -> dict[str, Any]:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return {"attention": {"qkv": weight(*(f"{attention}{p}_proj.weight" for p in "qkv")),
                              "o": weight(f"{attention}o_proj.weight")},
                "mlp_norm": scale(f"{prefix}post_attention_layernorm.weight"),
                "mlp": {"gate_up": weight(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
                        "down": weight(f"{mlp}down_proj.weight")}}

    params = {"fc": weight("fc.weight"), **layer(prefix)}
    if config.bias:
        params["fc_bias"] = jnp.asarray(tensor("fc.bias"), jnp.float32)
    if config.rotated:
        params["rotation"] = weight("rms_norm_rotation.weight")
    for i in range(1, config.layer.num_layers):
        name = f"layers.{i}."
        params[f"layers_{i - 1}"] = {**layer(name), "attention_norm": scale(f"{name}input_layernorm.weight")}
    if config.version == 3:
        params |= {"embed_norm": scale("midlayer.input_layernorm.weight"), "norm": scale("norm.weight"),
                   "state_norm": scale("midlayer.hidden_norm.weight")}
    targets = target.params["params"]
    own_table = "embed_tokens.weight" in tensors
    params["embed"] = {"table": jnp.asarray(tensors["embed_tokens.weight"]).astype(target.module.embed_format.dtype)
                       } if own_table else targets["embed"]
    if config.tied_head:
        params["output_table"] = targets["embed"]
    elif "lm_head.weight" in tensors:
        params["lm_head"] = {"w": Dense(jnp.asarray(tensors["lm_head.weight"]).T.astype(dense.dtype))}
    else:
        params["lm_head"] = targets["lm_head"]
    return params


def _read_tensors(directory: pathlib.Path) -> Tensors:
    """Every tensor of the head's one file."""
    path = directory / "model.safetensors"
    if path.exists():
        try:
            with safe_open(path, "numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    pickle = directory / "pytorch_model.bin"
    if not pickle.exists():
        raise UserError(f"{directory} holds neither model.safetensors nor pytorch_model.bin")
    try:
        import torch
    except ImportError:
        raise UserError(f"{pickle} needs PyTorch: pip install 'specmq-jax[torch]', or save it as model.safetensors"
                        ) from None
    try:
        loaded = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        raise UserError(f"{pickle} can't be loaded as plain tensors: {str(error).splitlines()[0]}") from None
    return {name: value.float().numpy() if value.is_floating_point() else value.numpy()
            for name, value in loaded.items()}
