"""Entries of config.json that change what a model computes and that the decoder does not honour.

They come from transformers' configurations of dense decoders, and from models that others derived from Llama under its
architecture's name. A family's declaration honours some of them. An entry that is in no table changes nothing that decoding
computes (token ids, dtypes, dropout, initialisation, `pretraining_tp`, which transformers 5 ignores), or is read elsewhere
(sizes, rope, quantisation).
"""

from collections.abc import Collection, Mapping
from typing import Any

from specmq_jax.entries import is_integer, shown
from specmq_jax.errors import UserError

_OFF, _NONE, _ONE = (False, None), (None, 0, False), (None, 1)
_FLAGS = (
    "qkv_bias", "attention_qkv_bias", "attention_out_bias", "attn_bias", "o_bias", "use_bias", "use_qkv_bias",
    "add_bias_linear", "lm_head_bias", "qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm", "attention_qk_norm",
    "alibi", "use_alibi", "parallel_attn", "parallel_residual", "use_parallel_residual", "use_sliding_window",
    "use_dynamic_ntk", "use_logn_attn", "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention",
    "rope_interleave", "rope_interleaved", "rope_traditional", "rotary_interleaved", "attn_temperature_tuning",
    "attn_output_gate", "use_attention_sinks", "use_mup", "norm_head", "scale_embedding", "normalize_embeddings",
)
_ABSENT = (
    "attention_multiplier", "attention_scale", "attention_scaling", "query_pre_attn_scalar", "softmax_scale", "scale_depth",
    "dim_model_base", "clip_qkv", "attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap",
    "attention_logit_cap", "final_logits_cap", "attention_chunk_size", "interleaved_sliding_window", "attention_window",
    "no_rope_layer_interval", "rope_local_base_freq", "rotary_dim", "kv_lora_rank", "q_lora_rank", "num_kv_shared_layers",
    "cla_share_factor", "moe_intermediate_size", "text_config", "vision_config", "audio_config", "num_experts",
    "num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts",
)
_FACTORS = (
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier", "key_multiplier",
    "attention_in_multiplier", "attention_out_multiplier", "output_multiplier_scale", "embedding_multiplier_scale",
    "scale_emb", "embedding_scale", "residual_scale", "width_scale", "partial_rotary_factor", "rotary_pct",
    "rotary_percentage", "rope_condense_ratio",
)
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,), "mlp_bias": (False,),
    "position_embedding_type": (None, "rope", "absolute"), "use_rope": (None, True), "is_causal": (None, True),
    "norm_type": (None, "rmsnorm", "rms_norm"), "pruned_heads": (None, {}, []), "per_layer_config": (None, {}),
    **dict.fromkeys(_FLAGS, _OFF), **dict.fromkeys(_ABSENT, _NONE), **dict.fromkeys(_FACTORS, _ONE),
}
"""The values with which an entry changes nothing. `absolute` is what old configurations say of any model."""
_PLAIN_LAYERS = {"layer_types": "full_attention", "mlp_layer_types": "dense", "no_rope_layers": 1}
"""Lists with an entry a layer, and the entry with which a layer is as all others. A 1 keeps a layer's rope."""


def refuse_unsupported(config: Mapping[str, Any], honoured: Collection[str] = ()) -> None:
    """Refuses what changes a model's function and is not among the entries honoured.

    Raises:
      UserError: an entry has such a value; the message names it.
    """
    for key, plain in _PLAIN.items():
        if key in config and key not in honoured and not _among(config[key], plain):
            raise UserError(f"config.json sets {key} = {shown(config[key])}; only {shown(plain[0])} is supported")
    for key, usual in _PLAIN_LAYERS.items():
        layers = config.get(key)
        if key not in honoured and layers is not None and not (
                isinstance(layers, list) and all(_among(layer, (usual,)) for layer in layers)):
            raise UserError(f"config.json sets {key} = {shown(layers)}; only {shown(usual)} for every layer is supported")


def refuse_window(config: Mapping[str, Any], max_position: int) -> None:
    """Refuses a sliding window, which a family does not have, that hides any of the model's positions from a later one.

    Raises:
      UserError: there is such a window.
    """
    window = config.get("sliding_window")
    if window is not None and not (is_integer(window) and window >= max_position):
        raise UserError(f"config.json sets sliding_window = {shown(window)}; only null, or a window of at least the "
                        f"{max_position} positions, is supported")


def _among(value: Any, plain: tuple[Any, ...]) -> bool:
    """Whether a value is one of `plain`; true is not 1, and false not 0."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in plain)
