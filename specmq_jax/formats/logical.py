"""Weights before packing, as readers and quantisers hand them to a format: plain values, or integers with their scales."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int16, Int32, UInt8

from specmq_jax.errors import UserError
from specmq_jax.formats.ranges import peak

AnyArray = np.ndarray | Array
"""Of the host, as readers have them, or of a device."""


@dataclasses.dataclass(frozen=True)
class Quantised(abc.ABC):
    """Integers with their scales, [in, out]; the last axis of every array is the output's."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """K and N."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "K N"]:
        """The weight's values, f32[K, N]."""

    @abc.abstractmethod
    def peak(self) -> float:
        """No less than the largest magnitude of its values, whatever codes there are."""

    @abc.abstractmethod
    def check(self, name: str) -> None:
        """Raises a `UserError` that begins with `name` where its arrays do not fit each other, codes their bits, or scales and
        offsets are not finite."""

    @classmethod
    def beside(cls, parts: Sequence[Self]) -> Self:
        """The weight whose output is that of the parts one behind the other; they agree in all that is no array."""
        return cls(**{field.name: _beside([getattr(part, field.name) for part in parts])
                      for field in dataclasses.fields(cls)})


def _beside(values: Sequence[Any]) -> Any:
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

    q: UInt8[AnyArray, "K N"]
    scales: Float[AnyArray, "G N"]
    group_size: int
    order: Int32[AnyArray, "K"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        rows = (jnp.asarray(self.q, jnp.float32) - 8) * _per_row(self.scales, self.group_size, len(self.q))
        return rows if self.order is None else rows[jnp.argsort(self.order)]

    def peak(self) -> float:
        return 8 * peak(self.scales)

    def check(self, name: str) -> None:
        _check_codes(name, self.q)
        rows, columns = self.shape
        _check_part(name, "scales", self.scales, (_groups(rows, self.group_size), columns))
        if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(rows)):
            raise UserError(f"{name} has an order that does not hold each of its {rows} inputs once")

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

    q: Int8[AnyArray, "K N"]
    scales: Float[AnyArray, "N"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        return jnp.asarray(self.q, jnp.float32) * jnp.asarray(self.scales, jnp.float32)

    def peak(self) -> float:
        return 128 * peak(self.scales)

    def check(self, name: str) -> None:
        if self.q.dtype != np.int8 or self.q.ndim != 2:
            raise UserError(f"{name} has codes {self.q.dtype}{list(self.q.shape)}; expected int8[K, N]")
        _check_part(name, "scales", self.scales, self.shape[1:])


@dataclasses.dataclass(frozen=True)
class ChannelInt4(Quantised):
    """w[k, n] = q[k, n] * scales[n] - offsets[n]: QoQ per channel (arXiv:2405.04532), and QQQ's with offsets 8 * scales.

    Attributes:
      q: uint8[K, N], 0..15.
      scales, offsets: f32[N]; an offset is a zero point times the scale.
    """

    q: UInt8[AnyArray, "K N"]
    scales: Float[AnyArray, "N"]
    offsets: Float[AnyArray, "N"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def dense(self) -> Float[Array, "K N"]:
        return jnp.asarray(self.q, jnp.float32) * jnp.asarray(self.scales, jnp.float32) - jnp.asarray(self.offsets)

    def peak(self) -> float:
        return 15 * peak(self.scales) + peak(self.offsets)

    def check(self, name: str) -> None:
        _check_codes(name, self.q)
        _check_part(name, "scales", self.scales, self.shape[1:])
        _check_part(name, "offsets", self.offsets, self.shape[1:])


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

    q: UInt8[AnyArray, "K N"]
    group_scales: AnyArray
    group_zeros: AnyArray | None
    channel_scales: Float[AnyArray, "N"]
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def integers(self) -> Float[Array, "K N"]:
        """w8 as f32[K, N]."""
        scales, q = _per_row(self.group_scales, self.group_size, len(self.q)), jnp.asarray(self.q, jnp.float32)
        if self.group_zeros is not None:
            return q * scales + _per_row(self.group_zeros, self.group_size, len(self.q))
        return jnp.clip(jnp.round((q - 8) * scales), -128, 127)

    def dense(self) -> Float[Array, "K N"]:
        return self.integers() * jnp.asarray(self.channel_scales, jnp.float32)

    def peak(self) -> float:
        return 128 * peak(self.channel_scales)  # an integer is held to 8 bits, however large its group's scale

    def check(self, name: str) -> None:
        _check_codes(name, self.q)
        rows, columns = self.shape
        groups = _groups(rows, self.group_size), columns
        _check_part(name, "group_scales", self.group_scales, groups)
        _check_part(name, "channel_scales", self.channel_scales, self.shape[1:])
        expected = np.float16 if self.group_zeros is None else np.uint8
        if self.group_scales.dtype != expected:
            raise UserError(f"{name} has group_scales of {self.group_scales.dtype}; expected {np.dtype(expected)} "
                            f"{'without' if self.group_zeros is None else 'beside'} group_zeros")
        if self.group_zeros is not None:
            _check_part(name, "group_zeros", self.group_zeros, groups)
            if not fits_bytes(np.asarray(self.q), np.asarray(self.group_scales), np.asarray(self.group_zeros), self.group_size):
                raise UserError(f"{name} has group_scales and group_zeros that take its codes beyond 8 bits")


def fits_bytes(q: UInt8[np.ndarray, "K N"], scales: UInt8[np.ndarray, "G N"], zeros: Int16[np.ndarray, "G N"], group_size: int
               ) -> bool:
    """Whether every q * scale + zero is an 8-bit integer, which the lowest and the highest code of a group decide."""
    starts = np.arange(0, len(q), group_size)
    low, high = (end.reduceat(q, starts, axis=0).astype(np.int32) * scales + zeros for end in (np.minimum, np.maximum))
    return low.min() >= -128 and high.max() <= 127


Logical = Float[AnyArray, "K N"] | Quantised
"""A weight before packing, [in, out]."""


def dense_values(logical: Logical) -> Float[Array, "K N"]:
    """The values of a logical weight, in the dtype they were stored in (f32 for integers)."""
    return logical.dense() if isinstance(logical, Quantised) else jnp.asarray(logical)


def _groups(rows: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-rows // group_size)


def _check_codes(name: str, q: UInt8[AnyArray, "K N"]) -> None:
    if q.dtype != np.uint8 or q.ndim != 2:
        raise UserError(f"{name} has codes {q.dtype}{list(q.shape)}; expected uint8[K, N]")
    if q.size and int(q.max()) > 15:
        raise UserError(f"{name} has a code {int(q.max())}; 4 bits hold 0 to 15")


def _check_part(name: str, part: str, values: AnyArray, expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise UserError(f"{name} has {part} of shape {list(values.shape)}; its codes ask for {list(expected)}")
    if not math.isfinite(peak(values)):
        raise UserError(f"{name} has {part} that are not finite: the checkpoint is damaged")


def _per_row(groups: AnyArray, group_size: int, rows: int) -> Float[Array, "K N"]:
    """A group's numbers at each of its rows, f32."""
    size = rows if group_size == -1 else group_size
    return jnp.repeat(jnp.asarray(groups, jnp.float32), size, axis=0)[:rows]
