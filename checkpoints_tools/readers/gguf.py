"""GGUF files of architecture llama (llama.cpp), parsed and dequantised by the `gguf` library."""

import pathlib
from typing import Any

import gguf
import numpy as np

from checkpoints_tools.readers import gguf_tokenizer
from checkpoints_tools.readers.base import ModuleReader, Shape, Stored
from checkpoints_tools.readers.hf import is_unturned
from specmq_jax.config import LlamaConfig
from specmq_jax.errors import UserError
from specmq_jax.parameters import Formats

_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "fp16", "Q4_0": "fp16", "Q4_1": "fp16"}
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
"""Of Llama 3.1 to 3.3. GGUF keeps none of it but the divisors of the frequencies that follow from it."""


class GgufReader(ModuleReader):
    """A GGUF file; its quantised types are dequantised, and q's and k's rows put back into Hugging Face's order.

    Raises:
      UserError: a truncated or damaged file, another architecture, a tensor that is missing, unknown, misshapen or of
        a type other than F32, F16, BF16, Q8_0, Q4_0, Q4_1; rotary factors that no known rope type has.
    """

    kind = "GGUF"

    def __init__(self, path: pathlib.Path):
        self.location = path
        self.files = [path]
        file = _open(path)
        self.metadata = dict(file.fields)
        self._tensors = {tensor.name: tensor for tensor in file.tensors}
        self.tokenizer = gguf_tokenizer.describe(self.value)
        self.config = self._find_config()
        self.llama = LlamaConfig.from_hf(self.config)
        self._locate()
        self._refuse_unknown_tensors()
        linears = {_PRECISIONS[stored.type] for module, stored in self.stored.items() if module.endswith("_proj")}
        embed = _PRECISIONS[self.stored["model.embed_tokens"].type]
        head = _PRECISIONS[self.stored["lm_head"].type] if "lm_head" in self.stored else embed
        self.formats = Formats.named({"linear": linears.pop() if len(linears) == 1 else "fp32", "embed": embed,
                                      "head": head})

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        gguf_tokenizer.save(self.value, directory)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata entry's contents, or `default`."""
        field = self.metadata.get(key)
        return default if field is None else field.contents()

    def _find_config(self) -> dict[str, Any]:
        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise UserError(f"{self.location} has architecture {architecture!r}; only 'llama' is supported")
        if self.value("split.count", 1) > 1:
            raise UserError(f"{self.location} is one part of {self.value('split.count')}; join them with "
                            "llama-gguf-split --merge")
        if self.value("llama.expert_count", 0):
            raise UserError(f"{self.location} is a mixture of {self.value('llama.expert_count')} experts, which is not "
                            "supported")
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self.value("llama.attention.key_length", hidden // heads)
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if self.value(key, head_dim) != head_dim:
                raise UserError(f"{self.location} has {key} {self.value(key)}; only the head size {head_dim} is supported")
        tokens = len(self.metadata["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in self.metadata else None
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": self.value("llama.vocab_size", tokens), "hidden_size": hidden, "head_dim": head_dim,
            "intermediate_size": self._number("feed_forward_length"), "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads, "num_key_value_heads": self.value("llama.attention.head_count_kv", heads),
            "rms_norm_eps": _shortest(self._number("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": self._number("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_parameters": self._find_rope(head_dim),
        }
        ids = {f"{name}_token_id": self.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return config | {name: value for name, value in ids.items() if value is not None}

    def _number(self, key: str) -> Any:
        value = self.value(f"llama.{key}")
        if not isinstance(value, int | float):
            raise UserError(f"{self.location} needs the number llama.{key} in its metadata; found {value!r}")
        return value

    def _find_rope(self, head_dim: int) -> dict[str, Any]:
        theta = {"rope_theta": _shortest(self.value("llama.rope.freq_base", 10000.0))}
        kind = self.value("llama.rope.scaling.type", "none")
        factor = self.value("llama.rope.scaling.factor", self.value("llama.rope.scale_linear", 1.0))
        if _ROPE_FACTORS in self._tensors:
            return theta | self._find_llama3(head_dim, theta["rope_theta"])
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return theta | {"rope_type": "default"}
        if kind == "linear":
            return theta | {"rope_type": "linear", "factor": _shortest(factor)}
        original = self.value("llama.rope.scaling.original_context_length")
        if kind == "yarn" and original:
            return theta | {"rope_type": "yarn", "factor": _shortest(factor),
                            "original_max_position_embeddings": original}
        raise UserError(f"{self.location} has rope scaling {kind!r}, which is not supported; known: none, linear, yarn "
                        "with its original context length, llama3")

    def _find_llama3(self, head_dim: int, theta: float) -> dict[str, Any]:
        divisors = self._values(_ROPE_FACTORS)
        if np.all(divisors == 1):
            return {"rope_type": "default"}
        scaling = _LLAMA3 | {"factor": _shortest(divisors.max())}
        plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        turns = _LLAMA3["original_max_position_embeddings"] * plain / (2 * np.pi)
        smooth = np.clip((turns - 1) / 3, 0, 1)
        expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise UserError(f"{self.location} has rotary factors ({_ROPE_FACTORS}) other than Llama 3's; this scaling is "
                            "not supported")
        return scaling

    def _holds(self, module: str) -> bool:
        return _tensor_name(module) in self._tensors

    def _check(self, module: str, shape: Shape) -> Stored:
        name = _tensor_name(module)
        if name not in self._tensors:
            raise UserError(f"{self.location} lacks the tensor {name}")
        tensor = self._tensors[name]
        found = tuple(int(size) for size in tensor.shape[::-1])
        expected = shape if is_unturned(module, shape) else shape[::-1]
        if found != expected:
            raise UserError(f"tensor {name} has shape {list(found)}; the metadata asks for {list(expected)}")
        if tensor.tensor_type.name not in _PRECISIONS:
            raise UserError(f"tensor {name} has type {tensor.tensor_type.name}; supported are {', '.join(_PRECISIONS)}")
        return Stored(tensor.tensor_type.name, int(tensor.n_bytes))

    def _refuse_unknown_tensors(self) -> None:
        known = {_tensor_name(module) for module in self.stored} | {_ROPE_FACTORS}
        for name in self._tensors.keys() - known:
            raise UserError(f"{self.location} holds the tensor {name}, which a Llama model of {self.llama.num_layers} "
                            "layers does not use")

    def _read_module(self, module: str) -> np.ndarray:
        values = self._values(_tensor_name(module))
        if module.endswith("q_proj"):
            values = _unpermute(values, self.llama.num_heads)
        elif module.endswith("k_proj"):
            values = _unpermute(values, self.llama.num_kv_heads)
        return values if is_unturned(module, values.shape) else values.T

    def _values(self, name: str) -> np.ndarray:
        """A tensor's values, f32. They are read from the file, not mapped, so what was read does not stay resident."""
        tensor = self._tensors[name]
        data = np.fromfile(self.location, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
        return gguf.quants.dequantize(data.reshape(tensor.data.shape), tensor.tensor_type)


class _SizedReader(gguf.GGUFReader):
    """Says what a truncated file lacks before the library fails on it."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        expected = start_offs
        for field in fields:
            *_, dims, raw_type, offset = field.parts
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(raw_type[0])]
            expected = max(expected, start_offs + int(offset[0]) + int(np.prod(dims)) * size // block)
        if len(self.data) < expected:
            raise UserError(f"the file is truncated: it has {len(self.data)} bytes, expected {expected}")
        super()._build_tensors(start_offs, fields)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
    try:
        return _SizedReader(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, OSError):
        raise UserError(f"{path} is truncated or damaged: it has {path.stat().st_size} bytes and its GGUF header can't be "
                        "read") from None


def _tensor_name(module: str) -> str:
    if module in _NAMES:
        return f"{_NAMES[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES.get(part, part)}.weight"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: it pairs neighbours in its rotary embedding, Hugging Face halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """The decimal number that an f32 stands for: 1e-5 for 9.99999974e-06."""
    return float(str(np.float32(value)))
