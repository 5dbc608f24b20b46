"""A frozen description of a model."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.network.hf_options import refuse_unsupported, refuse_window
from specmq_jax.network.rope_config import RopeConfig

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "max_position_embeddings": 2048},
    "MistralForCausalLM": {"model_type": "mistral", "max_position_embeddings": 131072, "num_key_value_heads": 8,
                           "sliding_window": 4096},
}
"""What transformers 5.24 takes for entries that config.json lacks, where the two architectures differ."""
_MOST_LAYERS = 10_000
"""Far more than any model has. Every layer's parameters are listed before a file is looked at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Architecture of a Llama-family decoder; sizes in elements, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    max_position: int = 2048
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()

    @property
    def qkv_features(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face `config.json`; an entry that it lacks has transformers' default.

        Raises:
          UserError: another architecture, an entry that is missing, of the wrong kind or senseless, sizes that do not
            fit each other, or an option that changes the function (biases, sliding window, another activation).
        """
        defaults = _DEFAULTS[_architecture(config)]
        refuse_unsupported(config)
        _check_token_ids(config)
        sizes = {key: entries.integer("config.json", key, config.get(key))
                 for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
        layers = entries.integer("config.json", "num_hidden_layers", config.get("num_hidden_layers"), high=_MOST_LAYERS)
        heads = sizes["num_attention_heads"]
        kv_heads, head_dim = _kv_heads(config, defaults, heads), _head_dim(config, sizes["hidden_size"], heads)
        max_position = entries.integer("config.json", "max_position_embeddings",
                                       config.get("max_position_embeddings", defaults["max_position_embeddings"]))
        refuse_window(config, defaults.get("sliding_window"), max_position)
        rope = RopeConfig.from_hf(config, max_position)
        if rope.type == "dynamic" and head_dim == 2:
            raise UserError("config.json: rope type 'dynamic' needs a head_dim above 2; found 2")
        return cls(
            vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"], num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, rms_norm_eps=entries.number("config.json", "rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            max_position=max_position, rope=rope,
            tie_embeddings=entries.flag("config.json", "tie_word_embeddings", config.get("tie_word_embeddings", False)))

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "LlamaConfig":
        """Reads `directory/config.json`; a missing or malformed file is a `UserError`."""
        return cls.from_hf(read_json(pathlib.Path(directory) / "config.json"))


def _architecture(config: Mapping[str, Any]) -> str:
    names, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise UserError(f"config.json needs a list of names 'architectures'; found {entries.shown(names)}")
    if not isinstance(kind, str | None):
        raise UserError(f"config.json needs a name 'model_type'; found {entries.shown(kind)}")
    kinds = {values["model_type"]: name for name, values in _DEFAULTS.items()}
    name = names[0] if names else kinds.get(kind or "", "none")
    if name not in _DEFAULTS:
        raise UserError(f"architecture {entries.shown(name)} is not supported; known: {', '.join(_DEFAULTS)}")
    if kind not in (None, _DEFAULTS[name]["model_type"]):
        raise UserError(f"config.json has model_type {entries.shown(kind)} beside architecture {name!r}; expected "
                        f"{_DEFAULTS[name]['model_type']!r}")
    return name


def _kv_heads(config: Mapping[str, Any], defaults: Mapping[str, Any], heads: int) -> int:
    found = config.get("num_key_value_heads", defaults.get("num_key_value_heads"))
    kv_heads = heads if found is None else entries.integer("config.json", "num_key_value_heads", found)
    if heads % kv_heads:
        raise UserError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} kv heads "
                        "(num_key_value_heads)")
    return kv_heads


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    found = config.get("head_dim")
    if found is None and hidden % heads:
        raise UserError(f"config.json: hidden_size {hidden} is not a multiple of {heads} attention heads "
                        "(num_attention_heads), and no head_dim is given")
    head_dim = hidden // heads if found is None else entries.integer("config.json", "head_dim", found)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    return head_dim


def _check_token_ids(config: Mapping[str, Any]) -> None:
    """Of whichever sign: old files have a pad_token_id of -1."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = config.get(key)
        if key == "eos_token_id" and isinstance(found, list):
            entries.integers("config.json", key, found, low=-entries.LARGEST)
        elif found is not None:
            entries.integer("config.json", key, found, low=-entries.LARGEST)


