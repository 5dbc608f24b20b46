"""Weights before packing, as readers and quantisers hand them to a format: plain values, or integers with their scales."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32, UInt8


@dataclasses.dataclass(frozen=True)
class Quantised(abc.ABC):
    """Integers with their scales, [in, out]; the last axis of every array is the output's."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """K and N."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "K N"]:
        """The weight's values, f32[K, N]."""

    @classmethod
    def beside(cls, parts: Sequence[Self]) -> Self:
        """The weight whose output is that of the parts one behind the other; they agree in all that is no array."""
        return cls(**{field.name: _beside([getattr(part, field.name) for part in parts])
                      for field in dataclasses.fields(cls)})


def _beside(values: Sequence[object]) -> object:
    return np.concatenate(values, axis=-1) if isinstance(values[0], np.ndarray) else values[0]


@dataclasses.dataclass(frozen=True)
class GroupedInt4(Quantised):
    """w[order[k], n] = (q[k, n] - 8) * scales[k // group_size, n].

    Attributes:
      q: uint8[K, N], 0..15.
      scales: f16 or f32 [ceil(K / group_size), N]; [1, N] when group_size is -1. May be negative.
      group_size: rows of K that share a scale, -1 for all.
      order: int32[K], the input that each row multiplies (GPTQ's act-order); None where row k multiplies input k.
    """

    q: UInt8[np.ndarray, "K N"]
    scales: Float[np.ndarray, "G N"]
    group_size: int
    order: Int32[np.ndarray, "K"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        rows = (jnp.asarray(self.q, jnp.float32) - 8) * _per_row(self.scales, self.group_size, len(self.q))
        return rows if self.order is None else rows[jnp.argsort(self.order)]

    @classmethod
    def beside(cls, parts: Sequence[Self]) -> Self:
        """Parts that multiply the same inputs have one order."""
        without = super().beside([dataclasses.replace(part, order=None) for part in parts])
        return dataclasses.replace(without, order=parts[0].order)


@dataclasses.dataclass(frozen=True)
class ChannelInt8(Quantised):
    """w[k, n] = q[k, n] * scales[n].

    Attributes:
      q: int8[K, N].
      scales: f32[N].
    """

    q: Int8[np.ndarray, "K N"]
    scales: Float[np.ndarray, "N"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        return jnp.asarray(self.q, jnp.float32) * jnp.asarray(self.scales, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ChannelInt4(Quantised):
    """w[k, n] = q[k, n] * scales[n] - offsets[n]: QoQ per channel (arXiv:2405.04532), and QQQ's with offsets 8 * scales.

    Attributes:
      q: uint8[K, N], 0..15.
      scales, offsets: f32[N]; an offset is a zero point times the scale.
    """

    q: UInt8[np.ndarray, "K N"]
    scales: Float[np.ndarray, "N"]
    offsets: Float[np.ndarray, "N"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        return jnp.asarray(self.q, jnp.float32) * jnp.asarray(self.scales, jnp.float32) - jnp.asarray(self.offsets)


@dataclasses.dataclass(frozen=True)
class TwoLevelInt4(Quantised):
    """4-bit codes that a group's parameters make 8-bit integers w8, and w[k, n] = w8[k, n] * channel_scales[n].

    Attributes:
      q: uint8[K, N], 0..15.
      group_scales: [ceil(K / group_size), N]. f16 (QQQ, arXiv:2406.09904): w8 = (q - 8) * scale, rounded half to even and
        held to [-128, 127]. uint8 (QoQ, arXiv:2405.04532): w8 = q * scale + zero.
      group_zeros: int16[ceil(K / group_size), N], -255 to 0, beside uint8 scales; else None.
      channel_scales: f32[N].
      group_size: rows of K in a group.
    """

    q: UInt8[np.ndarray, "K N"]
    group_scales: np.ndarray
    group_zeros: np.ndarray | None
    channel_scales: Float[np.ndarray, "N"]
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape

    def integers(self) -> Float[Array, "K N"]:
        """w8 as f32[K, N]."""
        scales, q = _per_row(self.group_scales, self.group_size, len(self.q)), jnp.asarray(self.q, jnp.float32)
        if self.group_zeros is not None:
            return q * scales + _per_row(self.group_zeros, self.group_size, len(self.q))
        return jnp.clip(jnp.round((q - 8) * scales), -128, 127)

    def dense(self) -> Float[Array, "K N"]:
        return self.integers() * jnp.asarray(self.channel_scales, jnp.float32)


Logical = Float[np.ndarray, "K N"] | Float[Array, "K N"] | Quantised
"""A weight before packing, [in, out]."""


def dense_values(logical: Logical) -> Float[Array, "K N"]:
    """The values of a logical weight, in the dtype they were stored in (f32 for integers)."""
    return logical.dense() if isinstance(logical, Quantised) else jnp.asarray(logical)


def _per_row(groups: np.ndarray, group_size: int, rows: int) -> Float[Array, "K N"]:
    """A group's numbers at each of its rows, f32."""
    size = rows if group_size == -1 else group_size
    return jnp.repeat(jnp.asarray(groups, jnp.float32), size, axis=0)[:rows]
