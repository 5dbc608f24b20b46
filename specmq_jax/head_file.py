"""The file of an official EAGLE head: what it holds, and what may be wrong with it."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open

from specmq_jax.eagle import ROTATED_TARGET, EagleConfig
from specmq_jax.errors import UserError
from specmq_jax.model import Model

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
_SAFETENSORS = "model.safetensors"
_SAMPLED_ROWS = 128


def tensor_shapes(directory: pathlib.Path) -> Shapes:
    """Shapes of the tensors that `read_tensors` would read, from the file's header where it has one; whatever their dtype,
    f32 stands for it. Errors are the same."""
    path = directory / _SAFETENSORS
    if path.exists():
        with _opened(path) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    else:
        shapes = {name: value.shape for name, value in read_tensors(directory).items()}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def read_tensors(directory: pathlib.Path) -> Tensors:
    """Every tensor of the head's one file; a missing, damaged or unsafe file is a `UserError`."""
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


def draft_ids(tensors: Tensors) -> Int64[np.ndarray, "V"]:
    """The target's id of each token that the head scores; the file holds offsets."""
    offsets = tensors["d2t"].astype(np.int64)
    return np.arange(len(offsets)) + offsets


def check_kind(directory: pathlib.Path, tensors: Tensors | Shapes) -> None:
    """The tensors that tell the head's sizes are there, and matrices; this and the other checks raise a `UserError`."""
    if "fc.weight" not in tensors:
        raise UserError(f"{directory} holds no EAGLE head: tensor fc.weight is missing")
    for name in ("fc.weight", "embed_tokens.weight", "lm_head.weight"):
        if name in tensors and tensors[name].ndim != 2:
            raise UserError(f"{directory}: tensor {name} has shape {list(tensors[name].shape)}; expected a matrix")


def check_vocabulary(directory: pathlib.Path, settings: Mapping[str, Any], tensors: Tensors | Shapes, vocab_size: int
                     ) -> None:
    """Every size of the vocabulary that the head tells is the target's, or its own vocabulary has an id for each token."""
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
    elif tensors["d2t"].shape != (scored,):
        raise UserError(f"{directory}: tensor d2t has shape {list(tensors['d2t'].shape)}; lm_head.weight, which scores "
                        f"{scored} tokens, asks for [{scored}]")


def check_draft_ids(directory: pathlib.Path, tensors: Tensors, vocab_size: int) -> None:
    """The ids that the head's own vocabulary stands for, if it has one, are the target's, each once."""
    if "d2t" not in tensors:
        return
    ids = draft_ids(tensors)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise UserError(f"{directory}: tensor d2t stands for token {outside[0]}, outside the vocabulary of {vocab_size}")
    if len(np.unique(ids)) < len(ids):
        raise UserError(f"{directory}: tensor d2t stands for a token twice")


def check_shapes(directory: pathlib.Path, settings: Mapping[str, Any], tensors: Tensors | Shapes, config: EagleConfig) -> None:
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
        expected["rms_norm_rotation.weight"] = (config.feature_size, config.feature_size)
    if config.rotated_target:
        # the target's own tables are in the rotated basis, the head's states are not
        expected |= own
    expected |= {name: shape for name, shape in own.items() if name in tensors}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{directory}: tensor {name} is missing from the EAGLE head")
        if tensors[name].shape != shape:
            raise UserError(f"{directory}: tensor {name} has shape {list(tensors[name].shape)}; the head's other sizes ask "
                            f"for {list(shape)}")


def check_basis(directory: pathlib.Path, tensors: Tensors, config: EagleConfig, target: Model) -> None:
    """Finds a head for a rotated target on one that isn't, and the other way round, where their tables tell.

    A rotated target has its norms' weights folded into its matrices, so that they are one, and its embedding is the original
    one times an orthogonal matrix: rows with other directions, and the same angles between them. A head without an
    embedding of its own tells nothing.
    """
    sign = "tensor rms_norm_rotation.weight" if config.rotated else f"{ROTATED_TARGET} in config.json"
    plain = f"{directory} holds a head for a rotated target ({sign}), and this target is not rotated"
    params = target.params["params"]
    if config.rotated_target and not bool(jnp.all(params["norm"]["scale"] == 1)):
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
    if config.rotated_target and alike > 0.99:
        raise UserError(plain)
    angles, moved = theirs @ theirs.T, np.abs(ours @ ours.T - theirs @ theirs.T)
    between = ~np.eye(len(angles), dtype=bool)
    turned = alike < 0.5 and between.any() and moved[between].mean() < 0.1 * np.abs(angles[between]).mean()
    if turned and not config.rotated_target:
        raise UserError(f"{directory} holds a head whose embedding is this target's in another basis: one of the two is "
                        "rotated and the other is not; adapt the head with python -m checkpoints_tools.convert_eagle_rotation")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
