"""Every rope type gives Hugging Face's logits.

`rope_goldens.npz` was made by transformers 5.23 and torch 2.13 on a CPU in fp32, eager attention, one forward pass over
`input_ids` (100 tokens; the last 32 rows are kept), for the configurations below with these weights: one
np.random.default_rng(7) draws standard normals f32 for the tensors in the order of their sorted Hugging Face names; norms
are 1 + 0.1 times the draw, matrices [out, in] the draw * in ** -0.5, twice that for q_proj and k_proj.
"""

import json

import numpy as np
import pytest
from fakes import DATA
from safetensors.numpy import save_file

import specmq_jax as sm

SIZES = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 64,
         "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "default": (256, {"rope_type": "default", "rope_theta": 10000.0}),
    "linear": (256, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "dynamic_within": (256, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "dynamic_beyond": (32, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "llama3": (256, {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3),
    "yarn": (128, {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}),
}


def tensors() -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens": (97, 64), "lm_head": (97, 64), "model.norm": (64,)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm": (64,), "post_attention_layernorm": (64,), "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}.items()}
    rng, drawn = np.random.default_rng(7), {}
    for name in sorted(f"{module}.weight" for module in shapes):
        shape = shapes[name.removesuffix(".weight")]
        values = rng.standard_normal(shape).astype(np.float32)
        scale = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        drawn[name] = (1 + 0.1 * values if len(shape) == 1 else values * scale * shape[1] ** -0.5).astype(np.float32)
    return drawn


@pytest.mark.parametrize("style", ["rope_parameters", pytest.param("rope_scaling", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_faces(tmp_path, monkeypatch, case, style):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path / "cache"))
    limit, rope = CASES[case]
    config = SIZES | {"max_position_embeddings": limit}
    if style == "rope_parameters":
        config["rope_parameters"] = rope
    else:
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    source = tmp_path / case
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors(), source / "model.safetensors")
    goldens = np.load(DATA / "rope_goldens.npz")
    found = np.asarray(sm.logits(sm.load(source, precision="fp32"), goldens["input_ids"]))[-32:]
    np.testing.assert_allclose(found, goldens[case], atol=2e-4)
