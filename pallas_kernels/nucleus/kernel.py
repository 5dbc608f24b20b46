"""Thresholds by search: each pass over a row sums up what lies above some thresholds at once, and keeps the gap between
two of them.

Scores are compared as integers of the same order. A search has an open gap `(low, high]`: what lies above `low` reaches the
goal, what lies above `high` doesn't. It is over when one score is left in the gap, or one integer. Top-k's goal is a count.
Top-p's is a mass, a sum of exp(score). A row with both looks for the count first, and then for a part of the mass that
was found.

The first passes are launches of many programs a row, of which each redoes the step that the pass before it allows. The last
launch has a program a row, which goes on until the search is over; that is rarely more than a pass.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.top_k import order

# Selections between scalars take constants that have a dtype: JAX lowers the others as booleans.
_OVER, _COUNT, _MASS = np.int32(0), np.int32(1), np.int32(2)  # what a search looks for
_NONE, _NOTHING = np.int32(0), np.float32(0)  # other numbers that are no variables Triton stores as unsigned integers
_BELOW_ALL = np.int32(-0x7F800002)  # one below the integer of -inf
_DEEP, _DEEPEST = np.float32(-32), np.float32(-64)  # exp(-32) of a whole vocabulary is no part of a sum in f32
_PASSES_BY_VALUE = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      block: scores a program of the first launches, a power of two.
      num_warps: Triton's for them.
      launches: how many there are.
      ways: thresholds of a pass, a power of two.
      last_block: scores that a program of the last launch has at a time, a power of two.
      last_warps: Triton's for it.
    """

    block: int = 4096
    num_warps: int = 8
    launches: int = 6
    ways: int = 16
    last_block: int = 8192
    last_warps: int = 16

    def __post_init__(self):
        launch.check_powers_of_two(self, block=1, num_warps=1, ways=2, last_block=1, last_warps=1)
        if self.launches < 0:
            raise ValueError(f"launches is {self.launches}; expected 0 or more")


def heuristic(columns: int) -> Config:
    """A config of some 32 programs a row, so that a few rows keep most of about 132 SMs busy."""
    block = min(4096, max(256, launch.power_of_two(pl.cdiv(columns, 32))))
    last = min(8192, launch.power_of_two(columns))
    return Config(block=block, num_warps=max(1, block // 512), last_block=last, last_warps=max(1, last // 512))


class _Search(NamedTuple):
    """A row's search. `mode` is what it looks for, `passes` how many were made for it, `(low, high]` the gap in integers;
    counts and masses are those above its ends; `goal` is a mass, 0 as long as it is not known."""

    mode: Int32[Array, ""]
    passes: Int32[Array, ""]
    low: Int32[Array, ""]
    high: Int32[Array, ""]
    low_count: Int32[Array, ""]
    high_count: Int32[Array, ""]
    low_mass: Float[Array, ""]
    high_mass: Float[Array, ""]
    goal: Float[Array, ""]


_INTEGERS = 6  # fields of a search that are


def _begun(top_k: Int32[Array, ""], top_p: Float[Array, ""], columns: int) -> _Search:
    mode = jnp.where((top_k > 0) & (top_k < columns), _COUNT, jnp.where(top_p < 1, _MASS, _OVER))
    return _Search(*map(jnp.asarray, (mode, _NONE, _BELOW_ALL, _NONE, np.int32(columns), _NONE, _NOTHING, _NOTHING, _NOTHING)))


def _key(value: Float[Array, "..."]) -> Int32[Array, "..."]:
    return order.keys(jnp.where(value == 0, _NOTHING, value))  # zeros of both signs are equals


def _value(key: Int32[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _thresholds(search: _Search, ways: int) -> Int32[Array, "W"]:
    """The gap's lower end, and what divides the gap evenly in values, or in integers, which is sure to end."""
    low, high, passes, way = search.low, search.high, search.passes, jnp.arange(ways)
    bottom, top = _value(low), _value(high)
    bottom = jnp.where((passes == 0) & ~(bottom >= _DEEP), _DEEP, bottom)  # below all there is no number
    by_value = (passes < _PASSES_BY_VALUE) & (bottom >= _DEEPEST)
    bottom = jnp.where(by_value, bottom, _DEEP)
    values = bottom + (top - bottom) * (way.astype(jnp.float32) / ways)
    step = jnp.maximum((high - low) >> (ways.bit_length() - 1), 1)
    keys = jnp.where(by_value, _key(values), low + step * way)
    return jnp.where(way == 0, low, jnp.maximum(jnp.minimum(keys, high - 1), low + 1))


def _sums(scores_ref, row: Array, first: Array, block: int, lanes: int, search: _Search, thresholds: Int32[Array, "W"]
          ) -> tuple[Int32[Array, "W"], Float[Array, "W"]]:
    """Of a block of a row: how many of the gap's scores lie above each threshold, and their mass.

    Each thread adds up its own scores for all thresholds, so that threads meet once.
    """
    columns, scores, inside = scores_ref.shape[1], [], []
    for start in range(0, block, lanes):
        column = first + start + jnp.arange(lanes)
        scores.append(plgpu.load(scores_ref.at[row, column], mask=column < columns, other=-jnp.inf))
        keys = _key(scores[-1])
        inside.append((column < columns) & (keys > search.low) & (keys <= search.high))
    count = sum(each.astype(jnp.int32) for each in inside)

    def summed() -> tuple[Int32[Array, "W"], Float[Array, "W"]]:
        counts = jnp.zeros((thresholds.shape[0], lanes), jnp.int32)
        masses = jnp.zeros((thresholds.shape[0], lanes), jnp.float32)
        for part, is_inside in zip(scores, inside, strict=True):
            above = is_inside[None, :] & (_key(part)[None, :] > thresholds[:, None])
            counts += above.astype(jnp.int32)
            masses += jnp.where(above, jnp.exp(part)[None, :], _NOTHING)
        return jnp.sum(counts, axis=1), jnp.sum(masses, axis=1)

    def nothing() -> tuple[Int32[Array, "W"], Float[Array, "W"]]:
        return jnp.zeros(thresholds.shape, jnp.int32), jnp.zeros(thresholds.shape, jnp.float32)

    return jax.lax.cond(jnp.sum(count) > 0, summed, nothing)


def _narrowed(search: _Search, thresholds: Int32[Array, "W"], counts: Int32[Array, "W"], masses: Float[Array, "W"],
              top_k: Int32[Array, ""], top_p: Float[Array, ""]) -> _Search:
    """The search behind a pass over its gap."""
    is_first = jnp.arange(thresholds.shape[0]) == 0
    counts, masses = search.high_count + counts, search.high_mass + masses
    all_mass = jnp.sum(jnp.where(is_first, masses, _NOTHING))
    goal = jnp.where(search.goal <= 0, top_p * all_mass, search.goal)
    # the lower end reaches the goal whatever has been rounded
    reaches = is_first | ((search.mode == _COUNT) & (counts >= top_k)) | ((search.mode == _MASS) & (masses >= goal))
    low = jnp.max(jnp.where(reaches, thresholds, search.low))
    low_count = jnp.min(jnp.where(reaches, counts, np.iinfo(np.int32).max))
    low_mass = jnp.min(jnp.where(reaches, masses, jnp.inf))
    high = jnp.min(jnp.where(reaches, search.high, thresholds))
    high_count = jnp.max(jnp.where(reaches, search.high_count, counts))
    high_mass = jnp.max(jnp.where(reaches, search.high_mass, masses))

    is_alone = low_count - high_count <= 1
    is_found = is_alone | (high - low <= 1)
    turns = is_found & (search.mode == _COUNT) & (top_p < 1)  # to the mass of what is left
    equals = (top_k - high_count).astype(jnp.float32) * jnp.exp(_value(high))
    left = jnp.where(is_alone, low_mass, high_mass + equals)
    is_over = (is_found & ~turns) | (turns & (low_count <= 1))
    mode = jnp.where(is_over, _OVER, jnp.where(turns, _MASS, search.mode))
    goal = jnp.where(search.mode == _MASS, goal, jnp.where(turns, top_p * left, search.goal))
    after = _Search(
        mode=mode, passes=jnp.where(turns, _NONE, search.passes + 1), low=low, high=jnp.where(turns, _NONE, high),
        low_count=low_count, high_count=jnp.where(turns, _NONE, high_count), low_mass=low_mass,
        high_mass=jnp.where(turns, _NOTHING, high_mass), goal=goal)
    return _Search(*(jnp.where(search.mode == _OVER, old, new) for old, new in zip(search, after, strict=True)))


def _resumed(row: Array, settings: tuple[Array, Array], integers_ref, floats_ref, thresholds_ref, counts_ref, masses_ref
             ) -> _Search:
    """The search that a launch has left, behind its pass."""
    _, parts, ways = counts_ref.shape
    search = _Search(*(integers_ref[row, i] for i in range(_INTEGERS)),
                     *(floats_ref[row, i] for i in range(len(_Search._fields) - _INTEGERS)))
    lanes, part = jnp.arange(ways), jnp.arange(launch.power_of_two(parts))
    place = row, part[:, None], lanes[None, :]
    mask = jnp.broadcast_to((part < parts)[:, None], (part.shape[0], ways))
    counts = jnp.sum(plgpu.load(counts_ref.at[place], mask=mask, other=0), axis=0)
    masses = jnp.sum(plgpu.load(masses_ref.at[place], mask=mask, other=0.0), axis=0)
    return _narrowed(search, plgpu.load(thresholds_ref.at[row, lanes]), counts, masses, *settings)


def _narrow_body(scores_ref, top_k_ref, top_p_ref, *refs, block: int, lanes: int, ways: int):
    *before, integers_ref, floats_ref, thresholds_ref, counts_ref, masses_ref = refs
    row, part = pl.program_id(0), pl.program_id(1)
    settings = top_k_ref[row], top_p_ref[row]
    search = _resumed(row, settings, *before) if before else _begun(*settings, scores_ref.shape[1])
    thresholds, way = _thresholds(search, ways), jnp.arange(ways)

    @pl.when(part == 0)
    def _():
        for i, value in enumerate(search[:_INTEGERS]):
            integers_ref[row, i] = value
        for i, value in enumerate(search[_INTEGERS:]):
            floats_ref[row, i] = value
        plgpu.store(thresholds_ref.at[row, way], thresholds)

    @pl.when(search.mode != _OVER)
    def _():
        counts, masses = _sums(scores_ref, row, part * block, block, lanes, search, thresholds)
        plgpu.store(counts_ref.at[row, part, way], counts)
        plgpu.store(masses_ref.at[row, part, way], masses)


def _last_body(scores_ref, top_k_ref, top_p_ref, *refs, block: int, lanes: int, ways: int):
    *before, out_ref = refs
    row, columns = pl.program_id(0), scores_ref.shape[1]
    settings = top_k_ref[row], top_p_ref[row]
    search = _resumed(row, settings, *before) if before else _begun(*settings, columns)

    def turn(search: _Search) -> _Search:
        thresholds = _thresholds(search, ways)

        def add(part: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            counts, masses = _sums(scores_ref, row, part * block, block, lanes, search, thresholds)
            return sums[0] + counts, sums[1] + masses

        none = jnp.zeros(ways, jnp.int32), jnp.zeros(ways, jnp.float32)
        counts, masses = jax.lax.fori_loop(0, pl.cdiv(columns, block), add, none)
        return _narrowed(search, thresholds, counts, masses, *settings)

    search = jax.lax.while_loop(lambda search: search.mode != _OVER, turn, search)
    out_ref[row] = _value(search.low + 1)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _narrow(scores: Float[Array, "M V"], top_k: Int32[Array, "M"], top_p: Float[Array, "M"], *before: Array, config: Config,
            interpret: bool) -> tuple[Array, ...]:
    """A pass over each row that is still searched, behind the launch whose outputs are given."""
    (rows, columns), ways = scores.shape, config.ways
    parts = pl.cdiv(columns, config.block)
    return tuple(launch.call(
        functools.partial(_narrow_body, block=config.block, lanes=min(config.block, 32 * config.num_warps), ways=ways),
        (scores, top_k, top_p, *before), grid=(rows, parts), num_warps=config.num_warps, num_stages=1, interpret=interpret,
        name="nucleus_narrow", out_shape=(
            jax.ShapeDtypeStruct((rows, _INTEGERS), jnp.int32),
            jax.ShapeDtypeStruct((rows, len(_Search._fields) - _INTEGERS), jnp.float32),
            jax.ShapeDtypeStruct((rows, ways), jnp.int32), jax.ShapeDtypeStruct((rows, parts, ways), jnp.int32),
            jax.ShapeDtypeStruct((rows, parts, ways), jnp.float32))))


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def least_kept(scores: Float[Array, "M V"], top_k: Int32[Array, "M"], top_p: Float[Array, "M"], *, config: Config,
               interpret: bool) -> Float[Array, "M"]:
    """See `api.least_kept`."""
    found: tuple[Array, ...] = ()
    for _ in range(config.launches):
        found = _narrow(scores, top_k, top_p, *found, config=config, interpret=interpret)
    block = config.last_block
    return launch.call(
        functools.partial(_last_body, block=block, lanes=min(block, 32 * config.last_warps), ways=config.ways),
        (scores, top_k, top_p, *found), grid=(len(scores),), num_warps=config.last_warps, num_stages=1, interpret=interpret,
        name="nucleus_last", out_shape=(jax.ShapeDtypeStruct((len(scores),), jnp.float32),))[0]
