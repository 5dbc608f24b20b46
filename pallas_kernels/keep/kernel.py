"""Rows of accepted tree paths moved in place, in many caches by one launch."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch

_ROWS = 16
"""Rows that a program of the heuristic's least threads keeps in registers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a launch is cut.

    Attributes:
      block: elements of each row that a program moves, a power of two.
      caches: of a launch, at most. A launch has two parameters of 8 bytes for each, of the 4 KiB that every driver takes.
      num_warps: of a program.
    """

    block: int = 512
    caches: int = 64
    num_warps: int = 2

    def __post_init__(self):
        launch.check_powers_of_two(self, block=1)
        if not 0 < self.caches <= 240:
            raise ValueError(f"caches is {self.caches}; expected 1 to 240")


def heuristic(entries: int, width: int, dtype: jnp.dtype) -> Config:
    """A config for paths of so many entries in rows of `width` elements."""
    # 64 threads take 16 bytes each of a row, so that the caches of a single sequence occupy every SM
    block = min(1024 // jnp.dtype(dtype).itemsize, launch.power_of_two(width))
    return Config(block=block, num_warps=2 * min(4, max(1, launch.power_of_two(entries) // _ROWS)))


def _body(paths_ref, counts_ref, lengths_ref, *refs, caches: int, block: int, is_slotted: bool, interpret: bool):
    # The memory of the last references is that of the caches before them. Programs share no element, so that reading all
    # of a path's rows before any is written takes no more than a barrier of the program.
    sequence, cache = pl.program_id(1), pl.program_id(2)
    slot, length = refs[0][sequence] if is_slotted else 0, lengths_ref[sequence]
    entries, rows, width = paths_ref.shape[1], refs[-1].shape[1], refs[-1].shape[2]
    entry = jnp.arange(launch.power_of_two(entries))[:, None]
    path = plgpu.load(paths_ref.at[sequence, entry], mask=entry < entries, other=0)
    source, target = length + path, length + entry
    moves = (entry < jnp.minimum(counts_ref[sequence], entries)) & (path != entry)
    moves &= (source < rows) & (target < rows)  # a row past the end must not touch foreign memory
    column = pl.program_id(0) * block + jnp.arange(block)[None, :]
    mask = moves & (column < width)

    def move(ref: Any) -> None:
        moved = plgpu.load(ref.at[slot, source, column], mask=mask, other=0)
        if not interpret:
            plgpu.debug_barrier()
        plgpu.store(ref.at[slot, target, column], moved, mask=mask)

    def move_one(first: int, refs: Sequence[Any]) -> None:
        """Moves in the program's cache; references can't be indexed, and few branches find one of many."""
        if len(refs) == 1:
            return move(refs[0])
        half = len(refs) // 2
        jax.lax.cond(cache < first + half, lambda: move_one(first, refs[:half]), lambda: move_one(first + half, refs[half:]))

    move_one(0, refs[-caches:])


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _keep(caches: tuple[Float[Array, "B L W"], ...], paths: Int32[Array, "N P"], counts: Int32[Array, "N"],
          lengths: Int32[Array, "N"], slots: Int32[Array, "N"] | None, *, config: Config, interpret: bool
          ) -> tuple[Float[Array, "B L W"], ...]:
    """A launch."""
    named = () if slots is None else (slots,)
    first = 3 + len(named)
    body = functools.partial(_body, caches=len(caches), block=config.block, is_slotted=slots is not None, interpret=interpret)
    return tuple(launch.call(
        body, (paths, counts, lengths, *named, *caches), aliases={first + i: i for i in range(len(caches))},
        grid=(pl.cdiv(caches[0].shape[2], config.block), len(paths), len(caches)), num_warps=config.num_warps, num_stages=1,
        interpret=interpret, name="keep_path",
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches]))


def keep_path(caches: Sequence[Float[Array, "B L H d"]], paths: Int32[Array, "N P"], counts: Int32[Array, "N"],
              lengths: Int32[Array, "N"], slots: Int32[Array, "N"] | None, *, config: Config, interpret: bool
              ) -> tuple[Float[Array, "B L H d"], ...]:
    """See `api.keep_path`; no slots are one sequence in the only one."""
    shape, kept = caches[0].shape, []
    flat = [cache.reshape(*shape[:2], -1) for cache in caches]
    for start in range(0, len(flat), config.caches):
        kept += _keep(tuple(flat[start:start + config.caches]), paths, counts, lengths, slots, config=config,
                      interpret=interpret)
    return tuple(cache.reshape(shape) for cache in kept)
