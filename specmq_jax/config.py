"""Frozen descriptions of a model and of decoding."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.sampling import Greedy, Sampler

__all__ = ["ARCHITECTURES", "DecodeConfig", "LlamaConfig", "RopeConfig", "TreeConfig", "read_json"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding as in Hugging Face `rope_parameters` / `rope_scaling`.

    `type` is one of default, linear, dynamic, llama3, yarn. Lengths are in tokens.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (earlier).

        Raises:
          UserError: the rope type is unknown or one of its parameters is missing.
        """
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
        limit = config.get("max_position_embeddings") or 2048
        known = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if kind not in known:
            raise UserError(f"rope type {kind!r} is not supported; known types: {', '.join(known)}")
        for key in known[kind]:
            if not isinstance(scaling.get(key), int | float):
                raise UserError(f"rope type {kind!r} needs the number {key!r} in config.json; found {scaling.get(key)!r}")
        optional = {k: scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor",
                                            "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
                    if scaling.get(k) is not None}
        original = scaling.get("original_max_position_embeddings") or limit
        return cls(type=kind, theta=float(theta), original_max_position=int(original), **optional)

    def frequencies(self, head_dim: int, length: int) -> tuple[np.ndarray, float]:
        """Inverse frequencies f32[head_dim // 2] and the factor that multiplies cos and sin.

        `length` is the longest sequence to be decoded; only `dynamic` (NTK) depends on it, and only beyond the
        original limit. Formulas: transformers `modeling_rope_utils.py`, and arXiv 2309.00071 for yarn.
        """
        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        theta = self.theta
        if self.type == "dynamic" and length > self.original_max_position:
            stretch = self.factor * length / self.original_max_position - (self.factor - 1)
            theta = theta * stretch ** (head_dim / (head_dim - 2))
        frequencies = theta**-exponent
        scale = 1.0
        if self.type == "linear":
            frequencies = frequencies / self.factor
        elif self.type == "llama3":
            frequencies = self._llama3(frequencies)
        elif self.type == "yarn":
            frequencies, scale = self._yarn(frequencies, head_dim)
        return frequencies.astype(np.float32), scale

    def _llama3(self, frequencies: np.ndarray) -> np.ndarray:
        turns = self.original_max_position * frequencies / (2 * math.pi)
        smooth = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies

    def _yarn(self, frequencies: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        def dimension(rotations: float) -> float:
            turns = self.original_max_position / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        frequencies = frequencies / self.factor * ramp + frequencies * (1 - ramp)

        def mscale(weight: float = 1.0) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return frequencies, self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return frequencies, mscale(self.mscale) / mscale(self.mscale_all_dim)
        return frequencies, mscale()


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
        """Reads a Hugging Face `config.json`.

        Raises:
          UserError: another architecture, a missing or inconsistent size, or an option that changes the function
            (biases, sliding window, another activation).
        """
        names = config.get("architectures") or ["LlamaForCausalLM" if config.get("model_type") == "llama" else "none"]
        if names[0] not in ARCHITECTURES:
            raise UserError(f"architecture {names[0]!r} is not supported; known: {', '.join(ARCHITECTURES)}")
        for option, plain in (("attention_bias", False), ("mlp_bias", False), ("sliding_window", None)):
            if config.get(option, plain) not in (plain, False):
                raise UserError(f"config.json sets {option} = {config[option]!r}; only {plain} is supported")
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json sets hidden_act = {config['hidden_act']!r}; only 'silu' is supported")
        sizes = {}
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise UserError(f"config.json needs a positive integer {key!r}; found {config.get(key)!r}")
            sizes[key] = config[key]
        heads = sizes["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or sizes["hidden_size"] // heads
        if heads % kv_heads:
            raise UserError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} kv heads")
        if head_dim % 2:
            raise UserError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
        return cls(
            vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"], num_layers=sizes["num_hidden_layers"], num_heads=heads,
            num_kv_heads=kv_heads, head_dim=head_dim, rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position=int(config.get("max_position_embeddings") or 2048),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)), rope=RopeConfig.from_hf(config))

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "LlamaConfig":
        """Reads `directory/config.json`; a missing or malformed file is a `UserError`."""
        return cls.from_hf(read_json(pathlib.Path(directory) / "config.json"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How to decode.

    Attributes:
      max_len: tokens of prompt and output that the cache holds.
      sampling: how a token is drawn from logits.
      stop_tokens: ids that end the output; the one that came stays in it.
      seed: of the sampling noise.
      prefill_chunks: the chunk lengths a prompt is taken in by; each is compiled once. None suits the device.
      reproducible: the target sums up in one order for any number of rows, so that on a GPU speculative output equals
        plain output bit for bit, for trees of at most 64 nodes and at the cost of some speed. Without it a near tie of
        two tokens may fall the other way. On a CPU it promises no bits, and nowhere for a nucleus (top_p below 1), whose
        probabilities XLA adds up.
    """

    max_len: int = 2048
    sampling: Sampler = Greedy()
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    prefill_chunks: tuple[int, ...] | None = None
    reproducible: bool = False

    def __post_init__(self) -> None:
        if self.max_len < 2:
            raise UserError(f"max_len must be at least 2 tokens; found {self.max_len}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Shape of an EAGLE-2 draft tree.

    Attributes:
      depth: levels of drafted tokens (the papers' 6/10/60 is depth/top_k/size).
      top_k: candidates of each row, and rows of each level.
      size: nodes that the target verifies, the root counted.
    """

    depth: int = 6
    top_k: int = 10
    size: int = 60

    def __post_init__(self) -> None:
        if min(self.depth, self.top_k) < 1 or self.size < 2:
            raise UserError(f"a tree needs depth and top_k of at least 1 and a size of at least 2; found {self.depth}, "
                            f"{self.top_k}, {self.size}")
        if self.size - 1 > self.candidates:
            raise UserError(f"a tree of depth {self.depth} and top_k {self.top_k} has {self.candidates} candidates; "
                            f"size {self.size} needs {self.size - 1}")

    @property
    def candidates(self) -> int:
        """How many scored nodes growing produces: k at the first level, k * k at each further one."""
        return self.top_k + (self.depth - 1) * self.top_k**2
