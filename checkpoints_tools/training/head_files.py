"""A head's parameters: random ones to begin with, and their official files."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int32

from checkpoints_tools.writers.shards import save_tensors
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination, put_json, staged
from specmq_jax.loading.head_tensors import head_tensors
from specmq_jax.loading.model import Params
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
    """f32 arrays, all that is trained: random, but for an EAGLE-3 head's norm and lm_head, which begin as those of a dense
    target."""
    tensors, params = head_tensors(config), {}
    drawn = [path for path in tensors if path.endswith("/w") and path != "lm_head/w"]
    for path, part in zip(drawn, jax.random.split(key, len(drawn)), strict=True):
        shape = tensors[path][0].shape[1], sum(tensor.shape[0] for tensor in tensors[path])
        params[path] = jax.random.normal(part, shape, jnp.float32) * shape[0]**-0.5
    params |= {path: jnp.ones(parts[0].shape, jnp.float32) for path, parts in tensors.items() if path.endswith("/scale")}
    if config.version == 3:
        targets = target["params"]
        columns = targets["lm_head"]["w"].values if "lm_head" in targets else targets["embed"]["table"].T
        columns = columns if ids is None else columns[:, ids]
        params |= {"lm_head/w": jnp.array(columns, jnp.float32),
                   "norm/scale": jnp.array(targets["norm"]["scale"], jnp.float32)}
    return unflatten_dict(params, sep="/")


def export(destination: pathlib.Path, params: Mapping[str, Any], config: EagleConfig, official: dict[str, Any],
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
        put_json(directory / "config.json", official)


def _halves(name: str, values: Any) -> Float[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        made = np.asarray(values, np.float16)
    if not np.isfinite(made).all():
        raise UserError(f"training has diverged: tensor {name} holds values that float16 can't hold; lower --learning_rate and "
                        "train again with another --work_dir")
    return made


def _official_tensors(params: Mapping[str, Any], config: EagleConfig) -> dict[str, np.ndarray]:
    """What the head has of its own; the other tables are its target's."""
    own, found = flatten_dict(params, sep="/"), {}
    for path, tensors in head_tensors(config).items():
        if path in own:
            values = np.asarray(own[path])
            ends = np.cumsum([tensor.shape[0] for tensor in tensors])[:-1]
            parts = np.split(values.T if path.endswith("/w") else values, ends)
            found |= {tensor.name: part for tensor, part in zip(tensors, parts, strict=True)}
    return found
