"""GGUF files of architecture llama (llama.cpp), parsed and dequantised by the `gguf` library."""

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from checkpoints_tools.readers.base import ModuleReader, Shape, Stored
from checkpoints_tools.readers.gguf import gguf_rope, gguf_tokenizer
from checkpoints_tools.readers.gguf.gguf_file import Metadata, open_file
from checkpoints_tools.readers.hf import is_unturned
from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.network.config import LlamaConfig

_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "fp16", "Q4_0": "fp16", "Q4_1": "fp16"}
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,), "use_parallel_residual": (False,), "logit_scale": (0, 1), "residual_scale": (0, 1),
    "embedding_scale": (0, 1), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "attention.scale": (0,),
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1), "attention.temperature_scale": (0,), "attention.shared_kv_layers": (0,),
    "rope.scaling.alpha": (0,),
}
"""Metadata (without `llama.`) that changes what a model computes, and the values with which it changes nothing."""
_TOKENS = "tokenizer.ggml.tokens"


class GgufReader(ModuleReader):
    """A GGUF file; its quantised types are dequantised, and q's and k's rows put back into Hugging Face's order.

    Raises:
      UserError: a truncated or damaged file, another architecture, metadata that is missing, of the wrong kind or not
        honoured, a tensor that is missing, unknown, misshapen or of a type other than F32, F16, BF16, Q8_0, Q4_0, Q4_1;
        rotary factors that no known rope type has; on reading, a value that is not finite.
    """

    kind, _precisions = "GGUF", _PRECISIONS

    def __init__(self, path: pathlib.Path):
        self.location = path
        self.files = [path]
        file = open_file(path)
        self._fields = dict(file.fields)
        self._tensors = {tensor.name: tensor for tensor in file.tensors}
        self.metadata = Metadata(self.value, str(path))
        self.config = self._find_config()
        self.tokenizer = gguf_tokenizer.describe(self.value, str(path), self.config["vocab_size"])
        self.llama = self._parse_config()
        self._locate()
        self._refuse_unknown_tensors()
        self.formats = self._find_formats()

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        gguf_tokenizer.save(self.value, directory, str(self.location))

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata entry's contents, or `default`."""
        field = self._fields.get(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError:
            raise UserError(f"{self.location} holds a text in {key} that is not UTF-8") from None

    def _find_config(self) -> dict[str, Any]:
        metadata = self.metadata
        architecture = metadata.text("general.architecture")
        if architecture != "llama":
            raise UserError(f"{self.location} has architecture {entries.shown(architecture)}; only 'llama' is supported")
        if metadata.integer("split.count", 1, low=0) > 1:
            raise UserError(f"{self.location} is one part of {self.value('split.count')} (split.count); join them with "
                            "llama-gguf-split --merge")
        self._refuse_unsupported()
        heads = metadata.integer("llama.attention.head_count", required=True)
        hidden = metadata.integer("llama.embedding_length", required=True)
        context = metadata.integer("llama.context_length", required=True)
        head_dim = metadata.integer("llama.attention.key_length", hidden // heads)
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if metadata.integer(key, head_dim, low=0) != head_dim:
                raise UserError(f"{self.location} has {key} {self.value(key)}; only the head size {head_dim} is supported")
        eps = metadata.number("llama.attention.layer_norm_rms_epsilon", required=True)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": self._find_vocabulary_size(), "hidden_size": hidden, "head_dim": head_dim,
            "intermediate_size": metadata.integer("llama.feed_forward_length", required=True),
            "num_hidden_layers": metadata.integer("llama.block_count", required=True), "num_attention_heads": heads,
            "num_key_value_heads": metadata.integer("llama.attention.head_count_kv", heads),
            "rms_norm_eps": gguf_rope.shortest(eps), "max_position_embeddings": context,
            "sliding_window": metadata.integer("llama.attention.sliding_window", 0, low=0) or None,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_parameters": gguf_rope.find_rope(metadata, head_dim, context, self._find_divisors(head_dim)),
        }
        for name in ("bos", "eos"):
            found = metadata.integer(f"tokenizer.ggml.{name}_token_id", low=0)
            if found is not None and found >= config["vocab_size"]:
                raise UserError(f"{self.location} has tokenizer.ggml.{name}_token_id {found} and a vocabulary of "
                                f"{config['vocab_size']}")
            config |= {} if found is None else {f"{name}_token_id": found}
        return config

    def _parse_config(self) -> LlamaConfig:
        try:
            llama = LlamaConfig.from_hf(self.config)
        except UserError as error:
            raise UserError(f"{self.location} as Hugging Face's configuration: {error}") from None
        gguf_rope.refuse_short_yarn(str(self.location), llama)
        return llama

    def _refuse_unsupported(self) -> None:
        for key, plain in _NEUTRAL.items():
            found = self.value(f"llama.{key}", plain[0])
            if found not in plain or isinstance(found, bool) != isinstance(plain[0], bool):
                raise UserError(f"{self.location} sets llama.{key} = {entries.shown(found)}; only "
                                f"{entries.shown(plain[0])} is supported")

    def _find_vocabulary_size(self) -> int:
        field = self._fields.get(_TOKENS)
        tokens = None if field is None else len(field.data)
        size = self.metadata.integer("llama.vocab_size", tokens)
        if size is None:
            raise UserError(f"{self.location} lacks both llama.vocab_size and {_TOKENS}")
        return size

    def _find_divisors(self, head_dim: int) -> np.ndarray | None:
        tensor = self._tensors.get(gguf_rope.FACTORS)
        if tensor is None:
            return None
        if tensor.tensor_type.name not in _PRECISIONS or tensor.n_elements != head_dim // 2:
            raise UserError(f"{self.location} needs {head_dim // 2} rotary factors in {gguf_rope.FACTORS}; found "
                            f"{tensor.n_elements} of type {tensor.tensor_type.name}")
        return self._values(gguf_rope.FACTORS)

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
            raise UserError(f"{self.location}: tensor {name} has shape {list(found)}; the metadata asks for {list(expected)}")
        if tensor.tensor_type.name not in _PRECISIONS:
            raise UserError(f"{self.location}: tensor {name} has type {tensor.tensor_type.name}; supported are "
                            f"{', '.join(_PRECISIONS)}")
        return Stored(tensor.tensor_type.name, int(tensor.n_bytes))

    def _refuse_unknown_tensors(self) -> None:
        known = {_tensor_name(module) for module in self.stored} | {gguf_rope.FACTORS}
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
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(data.reshape(tensor.data.shape), tensor.tensor_type)
        # Extremes carry a NaN on, and need no array of their own as isfinite does.
        if values.size and not np.isfinite((values.min(), values.max())).all():
            raise UserError(f"{self.location}: tensor {name} holds a value that is not finite")
        return values


def _tensor_name(module: str) -> str:
    if module in _NAMES:
        return f"{_NAMES[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES.get(part, part)}.weight"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: it pairs neighbours in its rotary embedding, Hugging Face halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
