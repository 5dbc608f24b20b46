"""A tiny model of every family, with whatever its configuration can switch on: config.json in both styles of transformers,
random tensors under the family's names, and what a second decoder makes of them."""

import dataclasses
import json
import math
import pathlib

import numpy as np
from decoders import Decoder
from safetensors.numpy import save_file

VOCAB, HIDDEN, INNER = 61, 32, 64
_PLAIN = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu",
          "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GEMMA = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GLM = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_FULL, _SLIDE = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyModel:
    """A model.

    Attributes:
      config: in the style of transformers 5.
      decoder: what it does.
      biases: the linear modules that have one.
      fused: of "qkv" and "gate_up", which the file holds as one.
      norm_bias: norms have one.
      v4: what a file of transformers 4 says otherwise; None leaves an entry out.
    """

    config: dict
    decoder: Decoder
    biases: str = ""
    fused: str = ""
    norm_bias: bool = False
    v4: dict

    @property
    def config_v4(self) -> dict:
        """The same model as transformers 4 wrote it."""
        config = self.config | {"torch_dtype": self.config["dtype"]}
        rope = config.pop("rope_parameters")
        full = dict(rope.get(_FULL, rope))
        config |= {"rope_theta": full.pop("rope_theta"), "transformers_version": "4.51.3"}
        if "partial_rotary_factor" in full:
            config["partial_rotary_factor"] = full.pop("partial_rotary_factor")
        config["rope_scaling"] = None if full["rope_type"] == "default" else full
        config |= self.v4
        return {key: value for key, value in config.items() if key != "dtype" and (value is not None or key not in self.v4)}

    def tensors(self, seed: int = 0) -> dict[str, np.ndarray]:
        """f32, drawn by sorted name: weights N(0, 1 / in), norms and biases about what leaves their mark."""
        rng, found = np.random.default_rng(seed), {}
        for name, shape in sorted(self._shapes().items()):
            values = rng.standard_normal(shape)
            if len(shape) == 2:
                values *= (1.0 if "embed" in name else 1.5) * shape[1] ** -0.5
            else:
                offset = 0 if name.endswith("bias") or self.decoder.norm == "rms+1" else 1
                values = offset + 0.2 * values
            found[name] = values.astype(np.float32)
        return found

    def write(self, directory: pathlib.Path, *, v4: bool = False, tensors: dict[str, np.ndarray] | None = None
              ) -> dict[str, np.ndarray]:
        """A Hugging Face directory; returns its tensors."""
        tensors = self.tensors() if tensors is None else tensors
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config_v4 if v4 else self.config))
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, directory / "model.safetensors")
        return tensors

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        config, decoder = self.config, self.decoder
        dim = config.get("head_dim") or HIDDEN // decoder.heads
        q, kv = decoder.heads * dim, decoder.kv_heads * dim
        linear = {"self_attn.o_proj": (HIDDEN, q), "mlp.down_proj": (HIDDEN, INNER)}
        linear |= ({"self_attn.qkv_proj": (q + 2 * kv, HIDDEN)} if "qkv" in self.fused else
                   {"self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)})
        linear |= ({"mlp.gate_up_proj": (2 * INNER, HIDDEN)} if "gate_up" in self.fused else
                   {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)})
        if decoder.act == "plain":
            linear = {name: shape for name, shape in linear.items() if "mlp" not in name}
            linear |= {"mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER)}
        layer = {f"{name}.weight": shape for name, shape in linear.items()}
        layer |= {f"{name}.bias": linear[name][:1] for name in linear if name.split(".")[1] in self.biases.split()}
        norms = [name for name in decoder.norms if name and not (decoder.parallel and name != "input_layernorm")]
        layer |= {f"{name}.{part}": (HIDDEN,) for name in norms for part in ("weight", *(["bias"] * self.norm_bias))}
        if decoder.qk_norm == "each":
            layer |= {f"self_attn.{part}_layernorm.norms.{head}.weight": (dim,)
                      for part, heads in (("q", decoder.heads), ("k", decoder.kv_heads)) for head in range(heads)}
        elif decoder.qk_norm:
            layer |= {f"self_attn.{part}_norm.weight": (dim if decoder.qk_norm == "head" else width,)
                      for part, width in (("q", q), ("k", kv))}
        found = {f"model.layers.{i}.{name}": shape for i in range(decoder.layers) for name, shape in layer.items()}
        found |= {f"model.norm.{part}": (HIDDEN,) for part in ("weight", *(["bias"] * self.norm_bias))}
        found |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (VOCAB, HIDDEN)}
        return found | {"model.embed_tokens.weight": (VOCAB, HIDDEN)}


def _model(kind: str, architecture: str, entries=None, *, biases="", fused="", norm_bias=False, v4=None, theta=10000.0,
           rope=None, **decoder) -> FamilyModel:
    config = _PLAIN | {"architectures": [architecture], "model_type": kind} | (entries or {})
    config["rope_parameters"] = rope or {"rope_type": "default", "rope_theta": theta}
    sizes = {"heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"],
             "layers": config["num_hidden_layers"]}
    return FamilyModel(config=config, decoder=Decoder(**sizes, **({"theta": theta} | decoder)), biases=biases, fused=fused,
                       norm_bias=norm_bias, v4=v4 or {})


def _types(*kinds: int) -> list[str]:
    return [_SLIDE if kind else _FULL for kind in kinds]


_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
         "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0, 8.0]}
_EACH = {"layer_types": _types(1, 1, 1, 0), "num_hidden_layers": 4, "sliding_window": 5}
_GEMMA_ENTRIES = {"head_dim": 12, "query_pre_attn_scalar": 20, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": None,
                  "tie_word_embeddings": True, "num_hidden_layers": 4, "sliding_window": 5}
_GEMMA_DECODER = {"norm": "rms+1", "norms": _GEMMA, "act": "gelu", "scale": 20**-0.5, "embedding": math.sqrt(HIDDEN)}

MODELS = {
    "llama": _model("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
                    biases="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "mistral": _model("mistral", "MistralForCausalLM", {"sliding_window": 5}, windows=(5,) * 3),
    "qwen2": _model("qwen2", "Qwen2ForCausalLM", {"sliding_window": 5, "use_sliding_window": False},
                    biases="q_proj k_proj v_proj", theta=1e6),
    "qwen2-window": _model(
        "qwen2", "Qwen2ForCausalLM", {"sliding_window": 5, "use_sliding_window": True, "layer_types": _types(0, 1, 1)},
        biases="q_proj k_proj v_proj", windows=(None, 5, 5), v4={"layer_types": None, "max_window_layers": 1}),
    "qwen3": _model("qwen3", "Qwen3ForCausalLM", {"head_dim": 16}, qk_norm="head", theta=1e6),
    "smollm3": _model(
        "smollm3", "SmolLM3ForCausalLM",
        {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True, "sliding_window": 5, "use_sliding_window": True,
         "layer_types": _types(0, 1, 0)}, thetas=(1e4, None, 1e4), windows=(None, 5, None),
        v4={"tie_word_embeddings": None, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 2}),
    "phi3": _model("phi3", "Phi3ForCausalLM", {"sliding_window": 5}, fused="qkv gate_up", windows=(5,) * 3),
    "phi3-partial": _model("phi3", "Phi3ForCausalLM", {"head_dim": 16}, fused="qkv gate_up", share=0.75,
                           rope={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}),
    "phi3-longrope": _model(
        "phi3", "Phi3ForCausalLM", {"original_max_position_embeddings": 16}, fused="qkv gate_up", rope=_LONG,
        factors=tuple(_LONG["long_factor"]), attention_factor=math.sqrt(1 + math.log(8) / math.log(16)),
        v4={"rope_scaling": {"type": "su", **{key: _LONG[key] for key in ("short_factor", "long_factor")}}}),
    "olmo2": _model("olmo2", "Olmo2ForCausalLM", norms=_POST, qk_norm="all"),
    "olmo3": _model(
        "olmo3", "Olmo3ForCausalLM", _EACH, norms=_POST, qk_norm="all", windows=(5, 5, 5, None),
        rope={_SLIDE: {"rope_type": "default", "rope_theta": 5e5},
              _FULL: {"rope_type": "linear", "rope_theta": 5e5, "factor": 1.0}}, theta=5e5, v4={"layer_types": None}),
    "gemma2": _model(
        "gemma2", "Gemma2ForCausalLM", _GEMMA_ENTRIES | {
            "layer_types": _types(1, 0, 1, 0), "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
        windows=(5, None, 5, None), score_cap=3.0, logit_cap=4.0, **_GEMMA_DECODER,
        v4={"layer_types": None, "tie_word_embeddings": None, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma3": _model(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA_ENTRIES | {"layer_types": _types(1, 1, 0, 1)}, qk_norm="head",
        windows=(5, 5, None, 5), thetas=(1e3, 1e3, 1e6, 1e3), **_GEMMA_DECODER,
        rope={_FULL: {"rope_type": "default", "rope_theta": 1e6}, _SLIDE: {"rope_type": "default", "rope_theta": 1e3}},
        v4={"layer_types": None, "sliding_window_pattern": 3, "rope_local_base_freq": 1e3}),
    "granite": _model(
        "granite", "GraniteForCausalLM", {"attention_multiplier": 0.3, "embedding_multiplier": 3.0,
                                          "residual_multiplier": 0.4, "logits_scaling": 2.0},
        scale=0.3, embedding=3.0, residual=0.4, logit=0.5),
    "glm4": _model(
        "glm4", "Glm4ForCausalLM", {"head_dim": 16, "attention_bias": True}, norms=_GLM, fused="gate_up", share=0.5,
        interleaved=True, biases="q_proj k_proj v_proj", v4={"attention_bias": None, "partial_rotary_factor": None},
        rope={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "exaone4": _model(
        "exaone4", "Exaone4ForCausalLM", _EACH, norms=_POST, qk_norm="head", windows=(5, 5, 5, None),
        thetas=(1e4, 1e4, 1e4, None)),
    "exaone4-full": _model("exaone4", "Exaone4ForCausalLM", {"sliding_window": None}, norms=_POST, qk_norm="head"),
    "cohere2": _model(
        "cohere2", "Cohere2ForCausalLM", _EACH | {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "tie_word_embeddings": True},
        norm="layer", parallel=True, windows=(5, 5, 5, None), thetas=(1e4, 1e4, 1e4, None), interleaved=True, logit=0.25,
        v4={"layer_types": None, "sliding_window_pattern": 4, "tie_word_embeddings": None}),
    "starcoder2": _model(
        "starcoder2", "Starcoder2ForCausalLM",
        {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True,
         "sliding_window": 5}, norm="layer", act="plain", windows=(5,) * 3, norm_bias=True,
        biases="q_proj k_proj v_proj o_proj c_fc c_proj", v4={"use_bias": None, "tie_word_embeddings": None}),
    "stablelm": _model(
        "stablelm", "StableLmForCausalLM", {"layer_norm_eps": 1e-5, "use_qkv_bias": True, "head_dim": None},
        norm="layer", share=0.25, norm_bias=True, biases="q_proj k_proj v_proj", v4={"partial_rotary_factor": None},
        rope={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}),
    "stablelm-parallel": _model(
        "stablelm", "StableLmForCausalLM",
        {"layer_norm_eps": 1e-5, "use_parallel_residual": True, "qk_layernorm": True, "num_attention_heads": 2,
         "num_key_value_heads": 1},
        norm="layer", share=0.5, norm_bias=True, parallel=True, qk_norm="each",
        rope={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
}
"""By name; the part before a hyphen is the family's."""
