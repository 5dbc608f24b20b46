"""Which families of dense decoders are read, each as a declaration: what its config.json means in the fields of `LlamaConfig`,
and what its tensors are called.

The entries and their defaults are those of transformers 5.24, whose files of either style (4 or 5) are read.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.network.family_entries import LAYER_TYPES, WHERE, Entries, Fields

_ROUNDED = {"bfloat16": 8, "float16": 11}
"""Binary digits of the types in which a multiplier that follows the weights' type is rounded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A declaration.

    Attributes:
      architecture: as config.json names it.
      fields: of `LlamaConfig`, from config.json.
      honoured: entries that `fields` reads, of those that `hf_options` refuses where they aren't plain.
      defaults: transformers' values of entries that config.json lacks, where they differ from Llama's.
      activations: values that the entries naming the MLP's activation may have.
      epsilon: the entry with the norms' epsilon.
      names: Hugging Face's modules of a layer that differ from Llama's, by their paths here.
      offset_norms: the files hold a norm's weight less one.
      interleaved: rope turns neighbouring dims of a head.
    """

    architecture: str
    fields: Callable[[Entries], Fields] = lambda found: {}
    honoured: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activations: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {"hidden_act": ("silu", "swish")})
    epsilon: str = "rms_norm_eps"
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    offset_norms: bool = False
    interleaved: bool = False

    def check_activation(self, config: Mapping[str, Any]) -> None:
        """Raises a `UserError` for an activation that is not the family's."""
        for key, known in self.activations.items():
            if key in config and config[key] not in known:
                raise UserError(f"config.json sets {key} = {entries.shown(config[key])}; only {known[0]!r} is supported")


def _llama(found: Entries) -> Fields:
    return found.biases(attention_bias="qkv o", mlp_bias="mlp")


def _upper_windows(found: Entries) -> Fields:
    """A window acts by a switch alone, on the layers listed or else on those from `max_window_layers` on."""
    if not found.flag("use_sliding_window"):
        _refuse_listed_windows(found)
        return {}
    if found.config.get("sliding_window") is None:
        return {}
    first = entries.integer(WHERE, "max_window_layers", found.config.get("max_window_layers"), low=0)
    return found.windows(found.sliding(lambda layer: layer >= first))


def _refuse_listed_windows(found: Entries) -> None:
    if any(found.sliding(lambda layer: False)):
        raise UserError("config.json lists 'sliding_attention' in layer_types, and use_sliding_window is false; expected true, "
                        "or 'full_attention' for every layer")


def _qwen2(found: Entries) -> Fields:
    return {"biases": ("qkv",), **_upper_windows(found)}


def _qwen3(found: Entries) -> Fields:
    return {"qk_norm": "head", **found.biases(attention_bias="qkv o"), **_upper_windows(found)}


def _smollm3(found: Entries) -> Fields:
    turned = found.config.get("no_rope_layers")
    if turned is None:
        interval = entries.integer(WHERE, "no_rope_layer_interval", found.config["no_rope_layer_interval"])
        turned = [int((layer + 1) % interval != 0) for layer in range(found.layers)]
    if not isinstance(turned, list) or len(turned) != found.layers or any(
            isinstance(flag, bool) or flag not in (0, 1) for flag in turned):
        raise UserError(f"config.json sets no_rope_layers = {entries.shown(turned)}; expected {found.layers} times 0 or 1")
    rope, windows = found.rope(), {}
    if not found.flag("use_sliding_window"):
        _refuse_listed_windows(found)
    elif found.config.get("sliding_window") is not None:
        windows = found.windows(found.sliding(lambda layer: not turned[layer]))
    ropes = () if all(turned) else tuple(rope if flag else None for flag in turned)
    return {"rope": rope, "ropes": ropes, **windows, **_llama(found)}


def _phi3(found: Entries) -> Fields:
    return {"rope": found.rope(longrope=True), **found.one_window()}


def _olmo2(found: Entries) -> Fields:
    return {"block": "post", "qk_norm": "all", **found.biases(attention_bias="qkv o")}


def _two_ropes(found: Entries, sliding: Sequence[bool], local: Mapping[str, Any]) -> Fields:
    """Ropes of full and of sliding layers: two objects in one entry (style 5), or that entry for full ones and `local`."""
    scaling = found.config.get("rope_scaling") or found.config.get("rope_parameters") or {}
    if isinstance(scaling, Mapping) and any(kind in scaling for kind in LAYER_TYPES):
        kinds = {kind: scaling.get(kind) for kind in LAYER_TYPES}
        if any(not isinstance(kind, Mapping) for kind in kinds.values()) or len(scaling) > len(kinds):
            raise UserError(f"config.json's rope_parameters hold {entries.shown(sorted(map(str, scaling)))}; expected an "
                            f"object each for {' and '.join(map(repr, LAYER_TYPES))}")
        full = found.rope(rope_parameters=kinds["full_attention"], rope_scaling=None)
        slide = found.rope(**{**local, "rope_parameters": kinds["sliding_attention"], "rope_scaling": None})
    else:
        full, slide = found.rope(), found.rope(rope_parameters=None, rope_scaling=None, **local)
    if full == slide or not any(sliding):
        return {"rope": full}
    return {"rope": full, "ropes": tuple(slide if slides else full for slides in sliding)}


def _olmo3(found: Entries) -> Fields:
    sliding = found.sliding(lambda layer: (layer + 1) % 4 != 0)
    return {**_olmo2(found), **found.windows(sliding), **_two_ropes(found, sliding, {})}


def _gemma(found: Entries) -> Fields:
    kind = found.config.get("dtype") or found.config.get("torch_dtype")
    return {"block": "both", "mlp": "gelu", "query_scale": found.number("query_pre_attn_scalar") ** -0.5,
            "embedding_multiplier": _rounded(math.sqrt(found.hidden_size), kind),
            "logit_cap": found.optional("final_logit_softcapping"), **found.biases(attention_bias="qkv o")}


def _gemma2(found: Entries) -> Fields:
    return {**_gemma(found), **found.windows(found.sliding(lambda layer: layer % 2 == 0)),
            "score_cap": found.optional("attn_logit_softcapping")}


def _gemma3(found: Entries) -> Fields:
    key = "sliding_window_pattern" if "sliding_window_pattern" in found.config else "_sliding_window_pattern"
    pattern = entries.integer(WHERE, key, found.config.get(key, 6))
    sliding = found.sliding(lambda layer: (layer + 1) % pattern != 0)
    local = {"rope_theta": found.config["rope_local_base_freq"]}
    return {**_gemma(found), "qk_norm": "head", **found.windows(sliding), **_two_ropes(found, sliding, local)}


def _granite(found: Entries) -> Fields:
    return {"query_scale": found.number("attention_multiplier"), "embedding_multiplier": found.number("embedding_multiplier"),
            "residual_multiplier": found.number("residual_multiplier"),
            "logit_multiplier": 1 / found.number("logits_scaling"), **_llama(found)}


def _glm4(found: Entries) -> Fields:
    return {"block": "both", **found.biases(attention_bias="qkv")}


def _exaone4(found: Entries) -> Fields:
    shared: Fields = {"block": "post", "qk_norm": "head"}
    if found.config.get("sliding_window") is None:
        if any(found.sliding(lambda layer: False)):
            raise UserError("config.json lists 'sliding_attention' in layer_types, and sliding_window is null; expected a "
                            "number")
        return shared
    sliding, rope = found.sliding(None), found.rope()
    ropes = tuple(rope if slides else None for slides in sliding)
    return {**shared, **found.windows(sliding), "rope": rope, "ropes": () if all(sliding) else ropes}


def _cohere2(found: Entries) -> Fields:
    pattern = entries.integer(WHERE, "sliding_window_pattern", found.config["sliding_window_pattern"])
    sliding, rope = found.sliding(lambda layer: (layer + 1) % pattern != 0), found.rope()
    ropes = tuple(rope if slides else None for slides in sliding)
    return {"norm": "layer", "block": "parallel", "rope": rope, "ropes": () if all(sliding) else ropes,
            "logit_multiplier": found.number("logit_scale"), **found.windows(sliding),
            **found.biases(attention_bias="qkv o")}


def _starcoder2(found: Entries) -> Fields:
    biases = ("norm", *found.biases(use_bias="qkv o mlp")["biases"])
    return {"norm": "layer", "mlp": "plain-gelu", "biases": biases, **found.one_window()}


def _stablelm(found: Entries) -> Fields:
    biases = ("norm", *found.biases(use_qkv_bias="qkv")["biases"])
    return {"norm": "layer", "biases": biases, "qk_norm": "each" if found.flag("qk_layernorm") else None,
            "block": "parallel" if found.flag("use_parallel_residual") else "pre"}


def _rounded(value: float, kind: Any) -> float:
    """A number as the weights' type holds it."""
    digits = _ROUNDED.get(str(kind).removeprefix("torch."), 24)
    mantissa, exponent = math.frexp(value)
    return math.ldexp(float(np.round(math.ldexp(mantissa, digits))), exponent - digits)


_POST = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_GEMMA: Mapping[str, Any] = {
    "activations": {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh", "gelu", None)},
    "offset_norms": True, "names": {"mlp_norm": "pre_feedforward_layernorm", **_POST}}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
                   "sliding_window": 4096}
_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", fields=_llama, honoured="attention_bias mlp_bias",
                    defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        architecture="MistralForCausalLM", fields=Entries.one_window, honoured="sliding_window",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(architecture="Qwen2ForCausalLM", fields=_qwen2, honoured="sliding_window use_sliding_window layer_types",
                    defaults=_QWEN_DEFAULTS),
    "qwen3": Family(architecture="Qwen3ForCausalLM", fields=_qwen3, defaults=_QWEN_DEFAULTS | {"head_dim": 128},
                    honoured="attention_bias sliding_window use_sliding_window layer_types"),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM", fields=_smollm3,
        honoured="attention_bias mlp_bias sliding_window use_sliding_window layer_types no_rope_layers no_rope_layer_interval",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True,
                  "no_rope_layer_interval": 4}),
    "phi3": Family(architecture="Phi3ForCausalLM", fields=_phi3, honoured="sliding_window partial_rotary_factor",
                   defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0}),
    "olmo2": Family(architecture="Olmo2ForCausalLM", fields=_olmo2, honoured="attention_bias", names=_POST,
                    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}),
    "olmo3": Family(architecture="Olmo3ForCausalLM", fields=_olmo3, names=_POST,
                    honoured="attention_bias sliding_window layer_types",
                    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096,
                              "rope_theta": 5e5}),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM", fields=_gemma2, **_GEMMA,
        honoured="attention_bias sliding_window layer_types attn_logit_softcapping final_logit_softcapping "
                 "query_pre_attn_scalar",
        defaults=_GEMMA_DEFAULTS | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                                    "final_logit_softcapping": 30.0}),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM", fields=_gemma3, **_GEMMA,
        honoured="attention_bias sliding_window layer_types final_logit_softcapping query_pre_attn_scalar rope_local_base_freq",
        defaults=_GEMMA_DEFAULTS | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    "granite": Family(
        architecture="GraniteForCausalLM", fields=_granite, defaults={"max_position_embeddings": 2048},
        honoured="attention_bias mlp_bias attention_multiplier embedding_multiplier residual_multiplier logits_scaling"),
    "glm4": Family(
        architecture="Glm4ForCausalLM", fields=_glm4, honoured="attention_bias partial_rotary_factor", interleaved=True,
        names={"attention_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"},
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7,
                  "attention_bias": True, "partial_rotary_factor": 0.5}),
    "exaone4": Family(architecture="Exaone4ForCausalLM", fields=_exaone4, honoured="sliding_window layer_types", names=_POST,
                      defaults={"max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
                                "sliding_window": 4096}),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM", fields=_cohere2,
        honoured="attention_bias sliding_window layer_types logit_scale position_embedding_type",
        epsilon="layer_norm_eps", interleaved=True,
        defaults={"max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.0625,
                  "sliding_window": 4096, "sliding_window_pattern": 4}),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM", fields=_starcoder2, honoured="sliding_window use_bias norm_type",
        epsilon="norm_epsilon", activations={"hidden_act": ("gelu_pytorch_tanh",)},
        names={"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 2, "norm_epsilon": 1e-5, "use_bias": True,
                  "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "stablelm": Family(
        architecture="StableLmForCausalLM", fields=_stablelm, epsilon="layer_norm_eps",
        honoured="use_qkv_bias qk_layernorm use_parallel_residual partial_rotary_factor",
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 32, "layer_norm_eps": 1e-5,
                  "partial_rotary_factor": 0.25}),
}
"""By `model_type`."""
