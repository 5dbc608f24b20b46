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
_LONG = ("longrope", "su", "yarn")
"""Names that models of two lists of divisors have for their rope type."""
_LONG_ORIGINAL = 4096
"""The original length of such a model that tells none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding as in Hugging Face `rope_parameters` / `rope_scaling`.

    `type` is one of default, linear, dynamic, llama3, yarn, longrope. Lengths are in tokens.

    Attributes:
      partial: the share of a head's dims that turn; the others pass.
      short_factor, long_factor: longrope's divisors of the frequencies, for sequences of at most the original length and for
        longer ones.
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
    partial: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position: int | None = None, *, partial: Any = None,
                longrope: bool = False) -> "RopeConfig":
        """Reads `rope_parameters` or `rope_scaling`, and what stands beside them, by the rules of transformers 5.24.

        `rope_scaling` stands in for all of `rope_parameters` where both are there. `rope_theta` beside them is taken where
        they have none. `original_max_position_embeddings` beside them overrides theirs, and only llama3 and yarn read it.
        Rules: transformers `modeling_rope_utils.py`, `RotaryEmbeddingConfigMixin`.

        Args:
          config: all entries of config.json.
          max_position: the model's positions; by default those that `config` gives, or 2048.
          partial: the share of a head's dims that turn, where the entry doesn't tell; None allows no other than 1.
          longrope: the model's scaling is of two lists, as in Phi-3.

        Raises:
          UserError: the rope type is unknown, one of its entries is missing, of the wrong kind or senseless, or an entry
            asks for what is not supported.
        """
        name, scaling = _scaling(config)
        where = f"config.json's {name}"
        kind = scaling["rope_type"] if "rope_type" in scaling else scaling.get("type", "default")
        limit = config.get("max_position_embeddings", 2048) if max_position is None else max_position
        limit = entries.integer("config.json", "max_position_embeddings", limit)
        theta = entries.number(where, "rope_theta", scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
        share = _share(where, scaling, partial)
        if longrope and kind in _LONG:
            return cls._long(where, config, scaling, limit, theta=theta, partial=share)
        if not isinstance(kind, str) or kind not in _USED:
            raise UserError(f"{where} has rope type {entries.shown(kind)}, which is not supported; known types: "
                            f"{', '.join(_USED)}")
        _refuse_other_rotations(where, scaling)
        original = _original_length(where, config, scaling, limit) if kind in ("llama3", "yarn") else limit
        if kind == "yarn" and scaling.get("factor", 1.0) is None:
            scaling["factor"] = limit / original
        values: dict[str, Any] = {key: _value(where, key, scaling.get(key)) for key in _USED[kind]
                                  if key in _REQUIRED or key in scaling}
        found = cls(type=kind, theta=theta, original_max_position=original, partial=share,
                    **{key: value for key, value in values.items() if value is not None})
        found._check_ranges(where)
        return found

    @classmethod
    def _long(cls, where: str, config: Mapping[str, Any], scaling: Mapping[str, Any], limit: int, *, theta: float,
              partial: float) -> "RopeConfig":
        """Phi-3's, by the rules of transformers' `configuration_phi3.py` and `modeling_rope_utils.py`."""
        _refuse_other_rotations(where, scaling)
        key = "original_max_position_embeddings"
        original = entries.integer("config.json", key, config.get(key, scaling.get(key, _LONG_ORIGINAL)), low=2)
        given, ratio = scaling.get("attention_factor"), scaling.get("factor")
        if given is not None:
            attention = entries.number(where, "attention_factor", given)
        else:
            ratio = limit / original if ratio is None else entries.number(where, "factor", ratio)
            attention = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
        return cls(type="longrope", theta=theta, original_max_position=original, attention_factor=attention, partial=partial,
                   short_factor=_divisors(where, "short_factor", scaling.get("short_factor")),
                   long_factor=_divisors(where, "long_factor", scaling.get("long_factor")))

    def turning(self, head_dim: int) -> int:
        """How many of a head's dims turn."""
        return int(head_dim * self.partial)

    def check_head(self, head_dim: int) -> None:
        """Raises a `UserError` where a head of so many dims can't be turned."""
        turning = self.turning(head_dim)
        if turning < 2 or turning % 2:
            raise UserError(f"config.json: partial_rotary_factor {self.partial:g} turns {turning} of a head's {head_dim} dims; "
                            "expected an even number")
        if self.type == "dynamic" and turning == 2:
            raise UserError("config.json: rope type 'dynamic' needs a head_dim above 2; found 2")
        for name, found in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if self.type == "longrope" and len(found) != turning // 2:
                raise UserError(f"config.json has {len(found)} numbers in {name!r}; expected one for each of {turning // 2} "
                                "frequencies")

    def _check_ranges(self, where: str) -> None:
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(f"{where} needs a 'high_freq_factor' above its 'low_freq_factor'; found {self.high_freq_factor} "
                            f"and {self.low_freq_factor}")
        if self.type == "yarn" and self.theta <= 1:
            raise UserError(f"{where} needs a 'rope_theta' above 1 for rope type 'yarn'; found {self.theta}")

    def frequencies(self, head_dim: int, length: int) -> tuple[np.ndarray, float]:
        """Inverse frequencies f32[head_dim // 2] and the factor that multiplies cos and sin of dims that turn.

        Dims that pass come last and have frequency 0. `length` is the longest sequence to be decoded: beyond the original
        length `dynamic` (NTK) stretches by it, and `longrope` takes its long list, for all positions. Formulas: transformers
        `modeling_rope_utils.py`, and arXiv 2309.00071 for yarn.
        """
        passing = (head_dim - self.turning(head_dim)) // 2
        head_dim = self.turning(head_dim)
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
        elif self.type == "longrope":
            frequencies = frequencies / np.asarray(self.long_factor if length > self.original_max_position else
                                                   self.short_factor)
            scale = 1.0 if self.attention_factor is None else self.attention_factor
        return np.pad(frequencies, (0, passing)).astype(np.float32), scale

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
        if key == "llama_4_scaling_beta" and (isinstance(value, bool) or value not in (None, 0)):
            raise UserError(f"{where} sets {key} = {entries.shown(value)}; only 0 is supported")


def _share(where: str, scaling: Mapping[str, Any], partial: Any) -> float:
    key = "partial_rotary_factor"
    found = scaling.get(key)
    if partial is None:
        if isinstance(found, bool) or found not in (None, 1):
            raise UserError(f"{where} sets {key} = {entries.shown(found)}; only 1 is supported")
        return 1.0
    share = entries.number("config.json", key, partial) if found is None else entries.number(where, key, found)
    if share > 1:
        raise UserError(f"config.json sets {key} = {share:g}; expected at most 1")
    return share


def _divisors(where: str, key: str, found: Any) -> tuple[float, ...]:
    if not isinstance(found, list | tuple):
        raise UserError(f"{where} needs a list of numbers {key!r}; found {entries.shown(found)}")
    return tuple(entries.number(where, key, value) for value in found)


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
