"""How positions become rotary angles, as Hugging Face's config.json says it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from specmq_jax import entries
from specmq_jax.errors import UserError

_USED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""The entries that each rope type reads, beside its base and original length; it ignores all others."""
_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")
_NEUTRAL = {"partial_rotary_factor": (None, 1), "llama_4_scaling_beta": (None, 0)}
"""Entries that change what other models compute, and the values with which they change nothing."""


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
    def from_hf(cls, config: Mapping[str, Any], max_position: int | None = None) -> "RopeConfig":
        """Reads `rope_parameters` or `rope_scaling`, and what stands beside them, by the rules of transformers 5.24.

        `rope_scaling` stands in for all of `rope_parameters` where both are there. `rope_theta` beside them is taken where
        they have none. `original_max_position_embeddings` beside them overrides theirs, and only llama3 and yarn read it.
        Rules: transformers `modeling_rope_utils.py`, `RotaryEmbeddingConfigMixin`.

        Args:
          config: all entries of config.json.
          max_position: the model's positions; by default those that `config` gives, or 2048.

        Raises:
          UserError: the rope type is unknown, one of its entries is missing, of the wrong kind or senseless, or an entry
            asks for what is not supported.
        """
        name, scaling = _scaling(config)
        where = f"config.json's {name}"
        kind = scaling["rope_type"] if "rope_type" in scaling else scaling.get("type", "default")
        if not isinstance(kind, str) or kind not in _USED:
            raise UserError(f"{where} has rope type {entries.shown(kind)}, which is not supported; known types: "
                            f"{', '.join(_USED)}")
        _refuse_other_rotations(where, scaling)
        limit = config.get("max_position_embeddings", 2048) if max_position is None else max_position
        limit = entries.integer("config.json", "max_position_embeddings", limit)
        theta = entries.number(where, "rope_theta", scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
        original = _original_length(where, config, scaling, limit) if kind in ("llama3", "yarn") else limit
        if kind == "yarn" and scaling.get("factor", 1.0) is None:
            scaling["factor"] = limit / original
        values: dict[str, Any] = {key: _value(where, key, scaling.get(key)) for key in _USED[kind]
                                  if key in _REQUIRED or key in scaling}
        found = cls(type=kind, theta=theta, original_max_position=original,
                    **{key: value for key, value in values.items() if value is not None})
        found._check_ranges(where)
        return found

    def _check_ranges(self, where: str) -> None:
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(f"{where} needs a 'high_freq_factor' above its 'low_freq_factor'; found {self.high_freq_factor} "
                            f"and {self.low_freq_factor}")
        if self.type == "yarn" and self.theta <= 1:
            raise UserError(f"{where} needs a 'rope_theta' above 1 for rope type 'yarn'; found {self.theta}")

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
        low, high = self.interpolated(head_dim)
        # An original length of a few tokens puts high below low; the ramp then falls, as transformers' does.
        ramp = np.clip((np.arange(head_dim // 2) - low) / (0.001 if low == high else high - low), 0, 1)
        frequencies = frequencies / self.factor * ramp + frequencies * (1 - ramp)

        def mscale(weight: float = 1.0) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return frequencies, self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return frequencies, mscale(self.mscale) / mscale(self.mscale_all_dim)
        return frequencies, mscale()

    def interpolated(self, head_dim: int) -> tuple[float, float]:
        """The dimensions between which yarn goes from frequencies as they were to frequencies divided by the factor."""

        def dimension(rotations: float) -> float:
            turns = self.original_max_position / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)


def _scaling(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and a copy of the entry that rules the rotation."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), Mapping | None):
            raise UserError(f"config.json needs an object or null for {name!r}; found {entries.shown(config[name])}")
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return name, dict(config.get(name) or {})


def _refuse_other_rotations(where: str, scaling: Mapping[str, Any]) -> None:
    for key, value in scaling.items():
        if isinstance(value, Mapping):
            raise UserError(f"{where} holds a rope of its own for {entries.shown(key)}; only one rope for all layers is "
                            "supported")
        if key in _NEUTRAL and (isinstance(value, bool) or value not in _NEUTRAL[key]):
            raise UserError(f"{where} sets {key} = {entries.shown(value)}; only {_NEUTRAL[key][1]} is supported")


def _original_length(where: str, config: Mapping[str, Any], scaling: Mapping[str, Any], limit: int) -> int:
    key = "original_max_position_embeddings"
    if key in config:
        return entries.integer("config.json", key, config[key])
    return entries.integer(where, key, scaling.get(key, limit))


def _value(where: str, key: str, value: Any) -> float | bool | None:
    """An entry's checked value; None leaves an optional one at its default."""
    if key == "truncate":
        return entries.flag(where, key, value)
    if key in _REQUIRED:
        return entries.number(where, key, value)
    if value is None:
        return None
    # A beta or mscale of 0 is none to transformers.
    return entries.number(where, key, value, zero=key != "attention_factor") or None
