"""Writes small checkpoints in the layouts that readers read, and logical weights to compare with."""

import json
import math
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file

from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.parameters import parameter_shapes

DATA = pathlib.Path(__file__).parents[1] / "data"
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "checkpoints"
"""What real toolkits wrote; beside the repository where it is developed, not in it."""
TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def random_tensors(config: dict, dtype=np.float32, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of a model, drawn by sorted name: N(1, 0.01) for norms, N(0, 1 / in) for matrices."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        values = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = (1 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5).astype(dtype)
    return tensors


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}.items()}
    return shapes


def logical(tensors: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """The logical weight of each path of `parameter_shapes`."""
    def turned(*names):
        return np.concatenate([tensors[f"{name}.weight"].T for name in names], axis=1)

    found = {"embed/table": tensors["model.embed_tokens.weight"], "norm/scale": tensors["model.norm.weight"]}
    if "lm_head.weight" in tensors:
        found["lm_head/w"] = turned("lm_head")
    for i in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{i}.", f"layers_{i}/"
        found |= {new + "attention_norm/scale": tensors[old + "input_layernorm.weight"],
                  new + "mlp_norm/scale": tensors[old + "post_attention_layernorm.weight"],
                  new + "attention/qkv/w": turned(*(f"{old}self_attn.{p}_proj" for p in "qkv")),
                  new + "attention/o/w": turned(old + "self_attn.o_proj"),
                  new + "mlp/gate_up/w": turned(old + "mlp.gate_proj", old + "mlp.up_proj"),
                  new + "mlp/down/w": turned(old + "mlp.down_proj")}
    assert found.keys() == parameter_shapes(LlamaConfig.from_hf(config)).keys()
    return found


def write_hf(directory: pathlib.Path, config: dict | None = None, tensors: dict[str, np.ndarray] | None = None,
             *, shards: int = 1) -> dict[str, np.ndarray]:
    """A Hugging Face directory; returns its tensors."""
    config = TINY if config is None else config
    tensors = random_tensors(config) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return tensors
    names = sorted(tensors)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def write_large(directory: pathlib.Path, config: dict) -> int:
    """A checkpoint of f16 noise, written without holding it; returns its bytes."""
    noise = (np.random.default_rng(0).standard_normal(4 << 20) * 0.02).astype(np.float16).tobytes()
    header, offset = {}, 0
    for name, shape in tensor_shapes(config).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, len(noise)):
            file.write(noise[:offset - start])
    return offset


_GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def write_gguf(path: pathlib.Path, config: dict, tensors: dict[str, np.ndarray], kind: str = "F32", *,
               architecture: str = "llama", metadata=None, extra: dict[str, np.ndarray] | None = None,
               skip: str = "") -> dict[str, np.ndarray]:
    """A GGUF whose matrices have type `kind`; returns the tensors that its values stand for, in Hugging Face's order.

    Rows of q and k are put into llama.cpp's order as its convert_hf_to_gguf.py does (LlamaModel.permute).
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if metadata is not None:
        metadata(writer)
    meant = {}
    for name, values in tensors.items():
        if name == skip:
            continue
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        part = next((p for p in "qk" if f"self_attn.{p}_proj" in name), None)
        stored = _permute(values, heads[part]) if part else values
        quantisation = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(stored.astype(np.float32), quantisation)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=quantisation)
        kept = gguf.quants.dequantize(packed, quantisation).reshape(stored.shape)
        meant[name] = _unpermute(kept, heads[part]) if part else kept
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    order = _permute(np.arange(len(rows))[:, None], heads)[:, 0]
    restored = np.empty_like(rows)
    restored[order] = rows
    return restored
