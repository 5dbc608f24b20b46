"""Log-softmax and its k best of each row: a program per block of a row, then one per row over the blocks' best.

Both launches take a best entry k times, the lowest index of equals. A block's candidates stand in that order behind
those of the blocks before it, so that among equal candidates the first is the one of the lowest index.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import launch
from pallas_kernels.top_k import order

MOST = 64  # the largest k: time rises with k, a sort's does not
_LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: the difference of two -inf is NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      block: logits a program of the first launch, a power of two of at least k.
      num_warps: Triton's for the first launch.
      combine_warps: Triton's for the second.
    """

    block: int = 1024
    num_warps: int = 2
    combine_warps: int = 4

    def __post_init__(self):
        for name in ("block", "num_warps", "combine_warps"):
            if not launch.is_power_of_two(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a power of two")


def heuristic(rows: int, columns: int, k: int) -> Config:
    """A config that starts a few programs for each of about 132 SMs, and a second launch of at most a few thousand."""
    block = 1024
    while block < 4096 and (rows * pl.cdiv(columns, block) > 1024 or pl.cdiv(columns, block) * k > 2048):
        block *= 2
    block = min(block, launch.power_of_two(columns))
    candidates = launch.power_of_two(pl.cdiv(columns, block) * k)
    return Config(block=block, num_warps=max(1, block // 512), combine_warps=min(8, max(1, candidates // 256)))


def _best(values: Float[Array, "n"], k: int) -> Int32[Array, "K"]:
    """Places of the k largest, the lowest of equals first, in a vector of the next power of two."""
    lanes, slots = jnp.arange(values.shape[0]), jnp.arange(launch.power_of_two(k))

    def step(slot: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        keys, places = carry
        best = jnp.argmax(keys)
        return jnp.where(lanes == best, order.TAKEN, keys), jnp.where(slots == slot, best, places)

    # Zeros of both signs are equal probabilities.
    keys = order.keys(jnp.where(values == 0, 0.0, values))
    return jax.lax.fori_loop(0, k, step, (keys, jnp.zeros(slots.shape, jnp.int32)))[1]


def _body(logits_ref, largest_ref, sum_ref, values_ref, indices_ref, *, block: int, k: int):
    columns = logits_ref.shape[1]
    row, part = pl.program_id(0), pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    first = pl.program_id(1) * block
    lanes = first + jnp.arange(block)
    logits = plgpu.load(logits_ref.at[row, lanes], mask=lanes < columns, other=-jnp.inf).astype(jnp.float32)
    largest = jnp.maximum(jnp.max(logits), _LOWEST)
    plgpu.store(largest_ref.at[part], largest)
    plgpu.store(sum_ref.at[part], jnp.sum(jnp.exp(logits - largest)))

    # Where fewer than k are left, the padding behind them fills up as -inf, and loses every tie.
    best = first + _best(logits, k)
    slots = jnp.arange(launch.power_of_two(k))
    values = plgpu.load(logits_ref.at[row, best], mask=best < columns, other=-jnp.inf).astype(jnp.float32)
    plgpu.store(values_ref.at[part * k + slots], values, mask=slots < k)
    plgpu.store(indices_ref.at[part * k + slots], best, mask=slots < k)


def _combine_body(largest_ref, sum_ref, values_ref, indices_ref, scores_ref, out_ref, *, blocks: int, k: int):
    row = pl.program_id(0)
    block = jnp.arange(launch.power_of_two(blocks))
    mask = block < blocks
    each = plgpu.load(largest_ref.at[row * blocks + block], mask=mask, other=_LOWEST)
    largest = jnp.max(each)
    total = jnp.sum(jnp.exp(each - largest) * plgpu.load(sum_ref.at[row * blocks + block], mask=mask, other=0.0))

    count = blocks * k
    lanes = jnp.arange(launch.power_of_two(count))
    candidates = plgpu.load(values_ref.at[row * count + lanes], mask=lanes < count, other=-jnp.inf)
    best = row * count + _best(candidates, k)
    slots = jnp.arange(launch.power_of_two(k))
    values = plgpu.load(values_ref.at[best], mask=slots < k, other=0.0)
    plgpu.store(scores_ref.at[row, slots], values - largest - jnp.log(total), mask=slots < k)
    plgpu.store(out_ref.at[row, slots], plgpu.load(indices_ref.at[best], mask=slots < k, other=0), mask=slots < k)


@functools.partial(jax.jit, static_argnames=("k", "config", "interpret"))
def log_softmax_top_k(logits: Float[Array, "M V"], k: int, *, config: Config, interpret: bool
                      ) -> tuple[Float[Array, "M k"], Int32[Array, "M k"]]:
    """See `api.log_softmax_top_k`."""
    rows, columns = logits.shape
    blocks = pl.cdiv(columns, config.block)
    parts = rows * blocks
    found = launch.call(
        functools.partial(_body, block=config.block, k=k), (logits,), grid=(rows, blocks), num_warps=config.num_warps,
        num_stages=1, interpret=interpret, name="top_k_blocks",
        out_shape=(jax.ShapeDtypeStruct((parts,), jnp.float32), jax.ShapeDtypeStruct((parts,), jnp.float32),
                   jax.ShapeDtypeStruct((parts * k,), jnp.float32), jax.ShapeDtypeStruct((parts * k,), jnp.int32)))
    return tuple(launch.call(
        functools.partial(_combine_body, blocks=blocks, k=k), found, grid=(rows,), num_warps=config.combine_warps,
        num_stages=1, interpret=interpret, name="top_k_combine",
        out_shape=(jax.ShapeDtypeStruct((rows, k), jnp.float32), jax.ShapeDtypeStruct((rows, k), jnp.int32))))
