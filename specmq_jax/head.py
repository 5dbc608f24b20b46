"""An EAGLE head ready to draft for a target, and the reading of official head files."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open

from specmq_jax import formats
from specmq_jax.cache import KVCache
from specmq_jax.config import LlamaConfig, read_json
from specmq_jax.eagle import EagleConfig, EagleHead, eagle_config, eagle_version
from specmq_jax.errors import UserError
from specmq_jax.formats import Dense, DenseFormat, WeightFormat
from specmq_jax.model import Model

Tensors = Mapping[str, np.ndarray]
_SAFETENSORS = "model.safetensors"
_SAMPLED_ROWS = 128


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
    tensors = _read_tensors(directory)
    _check_kind(directory, tensors)
    for name in ("fc.weight", "embed_tokens.weight", "lm_head.weight"):
        if name in tensors and tensors[name].ndim != 2:
            raise UserError(f"{directory}: tensor {name} has shape {list(tensors[name].shape)}; expected a matrix")
    settings = read_json(directory / "config.json")
    config = eagle_config(settings, {name: value.shape for name, value in tensors.items()}, target.config)
    capture = config.capture(target.config.num_layers)
    _check_target(config, capture, target.config)
    _check_vocabulary(directory, settings, tensors, target.config.vocab_size)
    _check_shapes(directory, settings, tensors, config)
    _check_basis(directory, tensors, config, target)
    dense = next(f for name in ("fp32", "bf16", "fp16") if (f := formats.get(name)).dtype == target.module.format.dtype)
    linear = formats.get(precision) if precision else dense
    head_format = dense if "lm_head.weight" in tensors else target.module.head_format
    module = EagleHead(config, linear, head_format, target.module.embed_format)
    return Head(config=config, module=module, capture=capture, params={
        "head": {"params": _parameters(tensors, config, linear, dense, target)}, "ids": _target_ids(tensors)})


def head_version(directory: str | pathlib.Path) -> int:
    """2 or 3, what kind of EAGLE head a directory holds (EAGLE-1 heads are of kind 2); errors as in `load_head`."""
    directory = pathlib.Path(directory)
    if (path := directory / _SAFETENSORS).exists():
        with _opened(path) as file:
            names = set(file.keys())
    else:
        names = set(_read_tensors(directory))
    _check_kind(directory, names)
    return eagle_version(names)


def _target_ids(tensors: Tensors) -> jax.Array | None:
    return jnp.asarray(_draft_ids(tensors), jnp.int32) if "d2t" in tensors else None


def _draft_ids(tensors: Tensors) -> Int64[np.ndarray, "V"]:
    """The target's id of each token that the head scores; the file holds offsets."""
    offsets = tensors["d2t"].astype(np.int64)
    return np.arange(len(offsets)) + offsets


def _check_target(config: EagleConfig, capture: tuple[int, ...], target: LlamaConfig) -> None:
    if not all(0 <= layer < target.num_layers for layer in capture):
        raise UserError(f"an EAGLE-3 head reads the target's layers {capture}; this target has {target.num_layers}, at "
                        "least 4 are needed")
    width = target.hidden_size * max(1, len(capture))
    if config.feature_size != width or config.vocab_size != target.vocab_size:
        raise UserError(f"the EAGLE head reads states of width {config.feature_size} over a vocabulary of "
                        f"{config.vocab_size}; this target gives {width} over {target.vocab_size}")


def _check_vocabulary(directory: pathlib.Path, settings: Mapping[str, Any], tensors: Tensors, vocab_size: int) -> None:
    """Every size of the vocabulary that the head tells, and the ids its own vocabulary stands for."""
    found = [settings.get("vocab_size", vocab_size)]
    found += [len(tensors[name]) for name in ("embed_tokens.weight", "t2d") if name in tensors]
    for size in found:
        if size != vocab_size:
            raise UserError(f"{directory} holds a head for a vocabulary of {size} tokens; this target has {vocab_size}")
    scored = len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else vocab_size
    if "d2t" not in tensors:
        if scored != vocab_size:
            raise UserError(f"{directory}: the head scores {scored} of the target's {vocab_size} tokens, and tensor d2t, "
                            "which says which, is missing")
        return
    if tensors["d2t"].shape != (scored,):
        raise UserError(f"{directory}: tensor d2t has shape {list(tensors['d2t'].shape)}; lm_head.weight, which scores "
                        f"{scored} tokens, asks for [{scored}]")
    ids = _draft_ids(tensors)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise UserError(f"{directory}: tensor d2t stands for token {outside[0]}, outside the vocabulary of {vocab_size}")
    if len(np.unique(ids)) < len(ids):
        raise UserError(f"{directory}: tensor d2t stands for a token twice")


def _check_shapes(directory: pathlib.Path, settings: Mapping[str, Any], tensors: Tensors, config: EagleConfig) -> None:
    """Every tensor that will be read is there, in the shape that the head's sizes ask for."""
    layer, hidden = config.layer, settings.get("hidden_size", config.layer.hidden_size)
    heads, kv_heads, mlp = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim, layer.intermediate_size

    def decoder_layer(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}self_attn.q_proj.weight": (heads, width), f"{prefix}self_attn.k_proj.weight": (kv_heads, width),
                f"{prefix}self_attn.v_proj.weight": (kv_heads, width), f"{prefix}self_attn.o_proj.weight": (hidden, heads),
                f"{prefix}mlp.gate_proj.weight": (mlp, hidden), f"{prefix}mlp.up_proj.weight": (mlp, hidden),
                f"{prefix}mlp.down_proj.weight": (hidden, mlp), f"{prefix}post_attention_layernorm.weight": (hidden,)}

    if config.version == 3:
        expected = {"fc.weight": (hidden, config.feature_size), **decoder_layer("midlayer.", config.embed_size + hidden),
                    "midlayer.input_layernorm.weight": (config.embed_size,), "midlayer.hidden_norm.weight": (hidden,),
                    "norm.weight": (hidden,)}
    else:
        expected = {"fc.weight": (hidden, config.embed_size + config.feature_size), **decoder_layer("layers.0.", hidden)}
        if config.bias:
            expected["fc.bias"] = (hidden,)
    for i in range(1, layer.num_layers):
        expected |= {**decoder_layer(f"layers.{i}.", hidden), f"layers.{i}.input_layernorm.weight": (hidden,)}
    own = {"embed_tokens.weight": (config.vocab_size, config.embed_size), "lm_head.weight": (layer.vocab_size, hidden)}
    if config.rotated:
        # the target's own tables are in the rotated basis, the head's states are not
        expected |= {"rms_norm_rotation.weight": (config.feature_size, config.feature_size), **own}
    expected |= {name: shape for name, shape in own.items() if name in tensors}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{directory}: tensor {name} is missing from the EAGLE head")
        if tensors[name].shape != shape:
            raise UserError(f"{directory}: tensor {name} has shape {list(tensors[name].shape)}; the head's other sizes ask "
                            f"for {list(shape)}")


def _check_basis(directory: pathlib.Path, tensors: Tensors, config: EagleConfig, target: Model) -> None:
    """Finds a head for a rotated target on one that isn't, and the other way round, where their tables tell.

    A rotated target has its norms' weights folded into its matrices, so that they are one, and its embedding is the original
    one times an orthogonal matrix: rows with other directions, and the same angles between them. A head without an
    embedding of its own tells nothing.
    """
    plain = f"{directory} holds a head for a rotated target (tensor rms_norm_rotation.weight), and this target is not rotated"
    params = target.params["params"]
    if config.rotated and not bool(jnp.all(params["norm"]["scale"] == 1)):
        raise UserError(plain)
    table = params["embed"]["table"]
    own = tensors.get("embed_tokens.weight")
    if own is None or own.shape != table.shape:
        return
    rows = np.linspace(0, len(own) - 1, min(_SAMPLED_ROWS, len(own)), dtype=np.int64)
    ours, theirs = own[rows].astype(np.float64), np.asarray(table[rows], np.float64)
    used = ours.any(axis=1) & theirs.any(axis=1)
    ours, theirs = (side[used] / np.linalg.norm(side[used], axis=1, keepdims=True) for side in (ours, theirs))
    alike = float(np.mean(np.sum(ours * theirs, axis=1))) if used.any() else 0.0
    if config.rotated and alike > 0.99:
        raise UserError(plain)
    angles, moved = theirs @ theirs.T, np.abs(ours @ ours.T - theirs @ theirs.T)
    between = ~np.eye(len(angles), dtype=bool)
    if not config.rotated and alike < 0.5 and between.any() and moved[between].mean() < 0.1 * np.abs(angles[between]).mean():
        raise UserError(f"{directory} holds a head whose embedding is this target's in another basis: one of the two is "
                        "rotated and the other is not; take the head that was made for this target")


def _parameters(tensors: Tensors, config: EagleConfig, linear: WeightFormat, dense: DenseFormat, target: Model
                ) -> dict[str, Any]:
    """Flax parameters in the module's names from the file's, whose shapes were checked."""
    prefix = "midlayer." if config.version == 3 else "layers.0."

    def weight(*names: str) -> dict[str, Any]:
        return {"w": linear.pack(jnp.concatenate([jnp.asarray(tensors[name]).T for name in names], axis=1))}

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


def _check_kind(directory: pathlib.Path, names: Container[str]) -> None:
    if "fc.weight" not in names:
        raise UserError(f"{directory} holds no EAGLE head: tensor fc.weight is missing")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _read_tensors(directory: pathlib.Path) -> Tensors:
    """Every tensor of the head's one file."""
    path = directory / _SAFETENSORS
    if path.exists():
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
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
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{pickle} can't be loaded as plain tensors: {reason.splitlines()[0]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{pickle} can't be loaded as plain tensors: expected names with a tensor each")
    return {name: value.float().numpy() if value.is_floating_point() else value.numpy()
            for name, value in loaded.items()}
