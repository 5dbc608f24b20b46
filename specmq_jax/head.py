"""An EAGLE head ready to draft for a target, and its making from an official head's file."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specmq_jax import formats, head_file
from specmq_jax.cache import KVCache
from specmq_jax.config import LlamaConfig, read_json
from specmq_jax.eagle import EagleConfig, EagleHead, eagle_config, eagle_version
from specmq_jax.errors import UserError
from specmq_jax.formats import Weight, WeightFormat
from specmq_jax.head_file import Shapes, Tensors
from specmq_jax.model import Model


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        layer = self.config.layer
        return (f"Head(eagle{self.config.version}, {layer.num_layers} {'layer' if layer.num_layers == 1 else 'layers'} of "
                f"{layer.hidden_size}, {layer.vocab_size} tokens, {self.module.format.name})")

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that drafting one level reads: all but the embedding."""
        tree = self.params["head"]["params"]
        return sum(leaf.nbytes for name, part in tree.items() if name != "embed" for leaf in jax.tree.leaves(part))

    def new_cache(self, max_len: int, *, limit: int | None = None) -> KVCache:
        """An empty cache of `max_len` rows, meant for `limit` tokens (default: as many)."""
        return KVCache.create(self.config.layer, max_len, self.module.format.dtype, limit=limit)

    def check(self, target: LlamaConfig) -> None:
        """Raises a `UserError` where the head was made for a target of other sizes."""
        _check_target(self.config, self.capture, target)


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
    tensors = head_file.read_tensors(directory)
    head = _described(directory, tensors, target, precision)
    head_file.check_draft_ids(directory, tensors, target.config.vocab_size)
    head_file.check_basis(directory, tensors, head.config, target)
    ids = jnp.asarray(head_file.draft_ids(tensors), jnp.int32) if "d2t" in tensors else None
    return dataclasses.replace(head, params={
        "head": {"params": _parameters(tensors, head.module, target)}, "ids": ids})


def outline_head(directory: str | pathlib.Path, target: Model, *, precision: str | None = None) -> Head:
    """What `load_head` would make, from the same arguments, with `jax.ShapeDtypeStruct`s in `params`; parts of the target
    are the very ones that it holds.

    Raises:
      UserError: as `load_head`, but for what the tensors' values tell.
    """
    directory = pathlib.Path(directory)
    tensors = head_file.tensor_shapes(directory)
    head = _described(directory, tensors, target, precision)

    def parameters() -> Any:
        states = jnp.zeros((1, head.config.feature_size))
        return head.module.init(jax.random.key(0), jnp.zeros(1, jnp.int32), states, head.new_cache(128),
                                method="everything")["params"]

    ids = jax.ShapeDtypeStruct(tensors["d2t"].shape, jnp.int32) if "d2t" in tensors else None
    return dataclasses.replace(head, params={
        "head": {"params": jax.eval_shape(parameters) | _borrowed(tensors, head.config, target)}, "ids": ids})


def _described(directory: pathlib.Path, tensors: Tensors | Shapes, target: Model, precision: str | None) -> Head:
    """A head without its parameters; whatever is wrong with the shapes of its tensors is a `UserError`."""
    head_file.check_kind(directory, tensors)
    settings = read_json(directory / "config.json")
    config = eagle_config(settings, {name: value.shape for name, value in tensors.items()}, target.config)
    capture = config.capture(target.config.num_layers)
    _check_target(config, capture, target.config)
    head_file.check_vocabulary(directory, settings, tensors, target.config.vocab_size)
    head_file.check_shapes(directory, settings, tensors, config)
    dense = next(f for name in ("fp32", "bf16", "fp16") if (f := formats.get(name)).dtype == target.module.format.dtype)
    linear = formats.get(precision) if precision else dense
    head_format = dense if "lm_head.weight" in tensors else target.module.head_format
    module = EagleHead(config, linear, head_format, target.module.embed_format)
    return Head(config=config, module=module, capture=capture, params=None)


def head_version(directory: str | pathlib.Path) -> int:
    """2 or 3, what kind of EAGLE head a directory holds (EAGLE-1 heads are of kind 2); errors as in `load_head`."""
    directory = pathlib.Path(directory)
    tensors = head_file.tensor_shapes(directory)
    head_file.check_kind(directory, tensors)
    return eagle_version(tensors)


def _check_target(config: EagleConfig, capture: tuple[int, ...], target: LlamaConfig) -> None:
    if not all(0 <= layer < target.num_layers for layer in capture):
        raise UserError(f"an EAGLE-3 head reads the target's layers {capture}; this target has {target.num_layers}, at "
                        "least 4 are needed")
    width = target.hidden_size * max(1, len(capture))
    if config.feature_size != width or config.vocab_size != target.vocab_size:
        raise UserError(f"the EAGLE head reads states of width {config.feature_size} over a vocabulary of "
                        f"{config.vocab_size}; this target gives {width} over {target.vocab_size}")


def _parameters(tensors: Tensors, module: EagleHead, target: Model) -> dict[str, Any]:
    """Flax parameters in the module's names from the file's, whose shapes were checked."""
    config = module.config
    prefix = "midlayer." if config.version == 3 else "layers.0."

    def weight(*names: str, form: WeightFormat = module.format) -> dict[str, Any]:
        # joined on the host: on the device the parts would lie beside the whole
        return {"w": _packed(jnp.asarray(np.concatenate([tensors[name] for name in names])), form)}

    def scale(name: str) -> dict[str, Any]:
        return {"scale": jnp.asarray(tensors[name], jnp.float32)}

    def layer(prefix: str) -> dict[str, Any]:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return {"attention": {"qkv": weight(*(f"{attention}{p}_proj.weight" for p in "qkv")),
                              "o": weight(f"{attention}o_proj.weight")},
                "mlp_norm": scale(f"{prefix}post_attention_layernorm.weight"),
                "mlp": {"gate_up": weight(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
                        "down": weight(f"{mlp}down_proj.weight")}}

    params = {"fc": weight("fc.weight"), **layer(prefix)}
    if config.bias:
        params["fc_bias"] = jnp.asarray(tensors["fc.bias"], jnp.float32)
    if config.rotated:
        params["rotation"] = weight("rms_norm_rotation.weight")
    for i in range(1, config.layer.num_layers):
        name = f"layers.{i}."
        params[f"layers_{i - 1}"] = {**layer(name), "attention_norm": scale(f"{name}input_layernorm.weight")}
    if config.version == 3:
        params |= {"embed_norm": scale("midlayer.input_layernorm.weight"), "norm": scale("norm.weight"),
                   "state_norm": scale("midlayer.hidden_norm.weight")}
    if "embed_tokens.weight" in tensors:
        params["embed"] = {"table": jnp.asarray(tensors["embed_tokens.weight"]).astype(module.embed_format.dtype)}
    if "lm_head.weight" in tensors:
        params["lm_head"] = weight("lm_head.weight", form=module.head_format)
    return params | _borrowed(tensors, config, target)


def _borrowed(tensors: Tensors | Shapes, config: EagleConfig, target: Model) -> dict[str, Any]:
    """The target's parameters that stand in for those which the head's file lacks."""
    targets, found = target.params["params"], {}
    if "embed_tokens.weight" not in tensors:
        found["embed"] = targets["embed"]
    if config.tied_head:
        found["output_table"] = targets["embed"]
    elif "lm_head.weight" not in tensors:
        found["lm_head"] = targets["lm_head"]
    return found


@functools.partial(jax.jit, static_argnums=1)
def _packed(rows: Float[Array, "N K"], linear: WeightFormat) -> Weight:
    return linear.pack(rows.T)
