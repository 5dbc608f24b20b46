"""A head's parameters: random ones to begin with, and their official files."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from checkpoints_tools.training.batched import Params
from checkpoints_tools.writers.shards import save_tensors
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination, staged
from specmq_jax.loading.checkpoint import write_json
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.eagle import EagleConfig, eagle_config


def official_config(version: int, target: LlamaConfig, hf: Mapping[str, Any], draft_vocabulary: int) -> dict[str, Any]:
    """config.json of a head: one layer of the target's sizes and rotary embedding.

    Args:
      version: 2 or 3.
      target: sizes.
      hf: the target's own config.json, whose rope scaling is taken over.
      draft_vocabulary: tokens that an EAGLE-3 head scores.
    """
    # Official heads are read with rope_theta and rope_scaling, the names from before transformers 5.
    scaling = None if target.rope.type == "default" else hf.get("rope_scaling") or hf["rope_parameters"]
    return {"architectures": ["LlamaForCausalLMEagle3" if version == 3 else "LlamaForCausalLMEagle"], "model_type": "llama",
            "hidden_size": target.hidden_size, "intermediate_size": target.intermediate_size, "num_hidden_layers": 1,
            "num_attention_heads": target.num_heads, "num_key_value_heads": target.num_kv_heads,
            "head_dim": target.head_dim, "hidden_act": "silu", "rms_norm_eps": target.rms_norm_eps,
            "max_position_embeddings": target.max_position, "vocab_size": target.vocab_size, "bias": False,
            "tie_word_embeddings": False, "torch_dtype": "float16", "rope_theta": target.rope.theta, "rope_scaling": scaling,
            **({"draft_vocab_size": draft_vocabulary} if version == 3 else {})}


def new_config(official: Mapping[str, Any], target: LlamaConfig) -> EagleConfig:
    """The module's configuration of a head that `official_config` describes."""
    width = target.hidden_size
    if "draft_vocab_size" not in official:
        return eagle_config(official, {"fc.weight": (width, 2 * width)}, target)
    tensors = {"fc.weight": (width, 3 * width), "midlayer.hidden_norm.weight": (width,),
               "lm_head.weight": (official["draft_vocab_size"], width)}
    return eagle_config(official, tensors, target)


def initial_parameters(config: EagleConfig, target: Params, ids: Int32[np.ndarray, "V"] | None, key: Array) -> dict[str, Any]:
    """f32 parameters: random, but for an EAGLE-3 head's norm and lm_head, which begin as the target's."""
    layer = config.layer
    width, heads = layer.hidden_size, layer.num_heads * layer.head_dim
    joined = 2 * width if config.version == 3 else width
    shapes = {"fc": (config.feature_size + (0 if config.version == 3 else config.embed_size), width),
              "qkv": (joined, layer.qkv_features), "o": (heads, width), "gate_up": (width, 2 * layer.intermediate_size),
              "down": (layer.intermediate_size, width)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))

    def weight(name: str) -> dict[str, Array]:
        rows, columns = shapes[name]
        return {"w": jax.random.normal(keys[name], (rows, columns), jnp.float32) * rows**-0.5}

    def ones() -> dict[str, Array]:
        return {"scale": jnp.ones(width, jnp.float32)}

    params = {"fc": weight("fc"), "attention": {"qkv": weight("qkv"), "o": weight("o")}, "mlp_norm": ones(),
              "mlp": {"gate_up": weight("gate_up"), "down": weight("down")}}
    if config.version == 3:
        columns = target["lm_head"]["w"] if "lm_head" in target else target["embed"]["table"].T
        columns = columns if ids is None else columns[:, ids]
        params |= {"embed_norm": ones(), "state_norm": ones(), "lm_head": {"w": jnp.array(columns, jnp.float32)},
                   "norm": {"scale": jnp.array(target["norm"]["scale"], jnp.float32)}}
    return params


def export(destination: pathlib.Path, params: Params, config: EagleConfig, official: dict[str, Any],
           ids: Int32[np.ndarray, "V"] | None) -> None:
    """Writes config.json and model.safetensors (f16) in the official layout; nothing is left where it fails.

    Raises:
      UserError: parameters that f16 can't hold, or a destination that is taken or can't be written.
    """
    check_destination(destination)
    tensors = {name: _halves(name, value) for name, value in _official_tensors(params, config).items()}
    if ids is not None:
        known = np.zeros(config.vocab_size, bool)
        known[ids] = True
        tensors |= {"d2t": ids.astype(np.int64) - np.arange(len(ids)), "t2d": known}
    with staged(destination) as directory:
        save_tensors(directory / "model.safetensors", tensors)
        write_json(directory / "config.json", official)


def _halves(name: str, values: Any) -> Float[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        made = np.asarray(values, np.float16)
    if not np.isfinite(made).all():
        raise UserError(f"training has diverged: tensor {name} holds values that float16 can't hold; lower --learning_rate and "
                        "train again with another --work_dir")
    return made


def _official_tensors(params: Params, config: EagleConfig) -> dict[str, np.ndarray]:
    layer, prefix = config.layer, "midlayer." if config.version == 3 else "layers.0."
    heads = layer.num_heads * layer.head_dim
    q, k, v = np.split(np.asarray(params["attention"]["qkv"]["w"]), [heads, heads + layer.num_kv_heads * layer.head_dim], 1)
    gate, up = np.split(np.asarray(params["mlp"]["gate_up"]["w"]), 2, axis=1)
    linears = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
               "self_attn.o_proj": params["attention"]["o"]["w"],
               "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": params["mlp"]["down"]["w"]}
    tensors = {f"{prefix}{name}.weight": np.asarray(value).T for name, value in linears.items()}
    tensors |= {"fc.weight": np.asarray(params["fc"]["w"]).T,
                f"{prefix}post_attention_layernorm.weight": params["mlp_norm"]["scale"]}
    if config.version == 3:
        tensors |= {"midlayer.input_layernorm.weight": params["embed_norm"]["scale"],
                    "midlayer.hidden_norm.weight": params["state_norm"]["scale"], "norm.weight": params["norm"]["scale"],
                    "lm_head.weight": np.asarray(params["lm_head"]["w"]).T}
    return tensors
