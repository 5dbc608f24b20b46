"""The values that a format can hold, as a quantiser sees them that chooses one row's codes after another's.

A row is one input of the layer, for all outputs; a group is the rows that share parameters. Groups' parameters come from
values, a row's codes from its group's parameters; what `value` computes is what the format's `unpack` gives.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specmq_jax.formats import (
    ChannelInt4,
    ChannelInt8,
    GroupedInt4,
    Int4GroupFormat,
    Int4Int8Format,
    Int8ChannelFormat,
    Quantised,
    TwoLevelInt4,
    WeightFormat,
)

_MOST_SHRUNK, _SHRINKS = 0.6, 40
_PROTECTED = 119
"""QoQ's 8-bit integers stop short of 127, so that the second level's rounding can't leave 8 bits (arXiv:2405.04532)."""


class Level(NamedTuple):
    """A group's parameters: codes stand for (code - zero) * step.

    Attributes:
      step, zero: f32[N] (of all groups together f32[G, N]), the step in units of the output's own scale.
    """

    step: Float[Array, "*G N"]
    zero: Float[Array, "*G N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(abc.ABC):
    """Hashable, a static argument of jitted functions.

    Attributes:
      group_size: rows that share a level, -1 for all.
      lowest, highest: codes.
    """

    group_size: int = -1
    lowest: int = 0
    highest: int = 15

    @abc.abstractmethod
    def level(self, values: Float[Array, "... g N"], channel: Float[Array, "N"], shrink: Float[Array, ""]) -> Level:
        """Of groups whose range is `shrink` times that of their values; [..., N]."""

    def channel(self, values: Float[Array, "G g N"]) -> Float[Array, "N"]:
        """f32[N], an output's own scale, which must be known before its groups' levels; one where there is none."""
        return jnp.ones(values.shape[-1], jnp.float32)

    def codes(self, values: Float[Array, "... N"], level: Level, channel: Float[Array, "N"]) -> Float[Array, "... N"]:
        """Those of the nearest values that the grid has."""
        codes = jnp.round(values / _nonzero(level.step * channel) + level.zero)
        return jnp.clip(codes, self.lowest, self.highest)

    def value(self, codes: Float[Array, "... N"], level: Level, channel: Float[Array, "N"]) -> Float[Array, "... N"]:
        return (codes - level.zero) * level.step * channel

    @abc.abstractmethod
    def logical(self, codes: Float[np.ndarray, "K N"], levels: Level, channel: Float[np.ndarray, "N"]) -> Quantised:
        """What the format packs, of the codes f32[K, N] and the levels [G, N]."""

    def search(self, values: Float[Array, "g N"], importance: Float[Array, "g"], channel: Float[Array, "N"]) -> Level:
        """The level of one group that errs least, over ranges down to 0.6 of the values' own.

        The error of an output is the sum of its rows' squared errors times the rows' importance, the mean square of the
        input: what the layer's output errs by where inputs are uncorrelated.
        """
        def error(level: Level) -> Float[Array, "N"]:
            found = self.value(self.codes(values, level, channel), level, channel)
            return jnp.sum(importance[:, None] * (found - values) ** 2, axis=0)

        def narrow(i: Array, best: tuple[Level, Array]) -> tuple[Level, Array]:
            level, least = best
            tried = self.level(values, channel, 1 - i * ((1 - _MOST_SHRUNK) / _SHRINKS))
            found = error(tried)
            return jax.tree.map(lambda new, old: jnp.where(found < least, new, old), tried, level), jnp.minimum(found, least)

        level = self.level(values, channel, jnp.float32(1))
        return jax.lax.fori_loop(1, _SHRINKS + 1, narrow, (level, error(level)))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetricInt4Grid(Grid):
    """W4A16's: f16 steps, of either sign, since the code -8 has no mirror image."""

    def level(self, values: Float[Array, "... g N"], channel: Float[Array, "N"], shrink: Float[Array, ""]) -> Level:
        step = (shrink * _largest(values) / -8).astype(jnp.float16).astype(jnp.float32)
        return Level(step, jnp.full_like(step, 8))

    def logical(self, codes: Float[np.ndarray, "K N"], levels: Level, channel: Float[np.ndarray, "N"]) -> GroupedInt4:
        return GroupedInt4(codes.astype(np.uint8), np.asarray(levels.step).astype(np.float16), self.group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Grid(Grid):
    """W8A8's and W8A16's: symmetric, a step for each output."""

    lowest: int = -127
    highest: int = 127

    def level(self, values: Float[Array, "... g N"], channel: Float[Array, "N"], shrink: Float[Array, ""]) -> Level:
        step = shrink * jnp.max(jnp.abs(values), axis=-2) / 127
        return Level(step, jnp.zeros_like(step))

    def logical(self, codes: Float[np.ndarray, "K N"], levels: Level, channel: Float[np.ndarray, "N"]) -> ChannelInt8:
        return ChannelInt8(codes.astype(np.int8), np.asarray(levels.step)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelInt4Grid(Grid):
    """W4A8's per channel: QQQ's without code 0 and symmetric, QoQ's with a zero point."""

    zeros: bool

    def level(self, values: Float[Array, "... g N"], channel: Float[Array, "N"], shrink: Float[Array, ""]) -> Level:
        if self.zeros:
            lowest, highest = _range(values, shrink)
            step = _nonzero((highest - lowest) / 15)
            return Level(step, jnp.clip(jnp.round(-lowest / step), 0, 15))
        step = _nonzero(shrink * jnp.max(jnp.abs(values), axis=-2) / 7)
        return Level(step, jnp.full_like(step, 8))

    def logical(self, codes: Float[np.ndarray, "K N"], levels: Level, channel: Float[np.ndarray, "N"]) -> ChannelInt4:
        step, zero = (np.asarray(part)[0] for part in levels)
        return ChannelInt4(codes.astype(np.uint8), step, zero * step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLevelGrid(Grid):
    """W4A8's with groups: steps in units of the output's scale, f16 in QQQ and whole in QoQ, make 8-bit integers."""

    zeros: bool

    def channel(self, values: Float[Array, "G g N"]) -> Float[Array, "N"]:
        largest = jnp.max(jnp.abs(values), axis=(0, 1))
        return _nonzero(largest / (_PROTECTED if self.zeros else 127))

    def level(self, values: Float[Array, "... g N"], channel: Float[Array, "N"], shrink: Float[Array, ""]) -> Level:
        if not self.zeros:
            step = (shrink * _largest(values) / -8 / channel).astype(jnp.float16).astype(jnp.float32)
            return Level(step, jnp.full_like(step, 8))
        lowest, highest = _range(jnp.round(values / channel), shrink)
        step = jnp.clip(jnp.round((highest - lowest) / 15), 1, 255)
        return Level(step, jnp.clip(jnp.round(-lowest / step), 0, 15))

    def codes(self, values: Float[Array, "... N"], level: Level, channel: Float[Array, "N"]) -> Float[Array, "... N"]:
        codes = super().codes(values, level, channel)
        if self.zeros:
            # a row may lie outside the range that its group's step came from, but w8 has to be an 8-bit integer
            return jnp.clip(codes, level.zero - 128 // level.step, level.zero + 127 // level.step)
        near = [jnp.clip(codes + shift, 0, 15) for shift in (0, -1, 1)]
        errors = [jnp.abs(self.value(tried, level, channel) - values) for tried in near]
        best, least = near[0], errors[0]
        for tried, error in zip(near[1:], errors[1:], strict=True):
            best, least = jnp.where(error < least, tried, best), jnp.minimum(error, least)
        return best

    def value(self, codes: Float[Array, "... N"], level: Level, channel: Float[Array, "N"]) -> Float[Array, "... N"]:
        return jnp.clip(jnp.round((codes - level.zero) * level.step), -128, 127) * channel

    def logical(self, codes: Float[np.ndarray, "K N"], levels: Level, channel: Float[np.ndarray, "N"]) -> TwoLevelInt4:
        step, zero = (np.asarray(part) for part in levels)
        scales = step.astype(np.uint8 if self.zeros else np.float16)
        zeros = (-zero * step).astype(np.int16) if self.zeros else None
        return TwoLevelInt4(codes.astype(np.uint8), scales, zeros, np.asarray(channel), self.group_size)


def grid_of(weight_format: WeightFormat) -> Grid:
    """The grid of a quantised format; a dense one has none (`TypeError`)."""
    match weight_format:
        case Int4GroupFormat():
            return SymmetricInt4Grid(group_size=weight_format.group_size)
        case Int8ChannelFormat():
            return Int8Grid()
        case Int4Int8Format(group_size=-1):
            zeros = weight_format.scheme == "qoq"
            return ChannelInt4Grid(zeros=zeros, lowest=0 if zeros else 1)
        case Int4Int8Format():
            return TwoLevelGrid(zeros=weight_format.scheme == "qoq", group_size=weight_format.group_size)
    raise TypeError(f"{weight_format.name} holds plain values")


def _largest(values: Float[Array, "... g N"]) -> Float[Array, "... N"]:
    """The entry of largest magnitude, with its sign."""
    index = jnp.argmax(jnp.abs(values), axis=-2, keepdims=True)
    return jnp.take_along_axis(values, index, axis=-2)[..., 0, :]


def _range(values: Float[Array, "... g N"], shrink: Float[Array, ""]) -> tuple[Float[Array, "... N"], Float[Array, "... N"]]:
    """The least and the greatest value, with zero between them."""
    return jnp.minimum(values.min(axis=-2), 0) * shrink, jnp.maximum(values.max(axis=-2), 0) * shrink


def _nonzero(scales: Float[Array, "..."]) -> Float[Array, "..."]:
    """One where a scale of zero would divide by it: all codes of such a group mean zero."""
    return jnp.where(scales == 0, 1.0, scales)
