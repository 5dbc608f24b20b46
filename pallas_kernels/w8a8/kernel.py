"""Rounding rows to 8 bits, and the W8A8 product on the tensor cores, transposed: out^T = W q^T.

Weights lie with K innermost, which is how the tensor core wants 8-bit operands; as its left operand they need no
transposition, and as few as 8 rows of activations make a product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8

from pallas_kernels import launch
from pallas_kernels.w8a8.reference import LARGEST

MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the product is cut.

    Attributes:
      block_n: outputs a program computes, a power of two of at least 16.
      block_k: columns of K in a loop iteration, a power of two of at least 32.
      split_k: shares of K; fewer come out when K has fewer blocks. A share is exact; their scaled sums are f32.
      num_warps, num_stages: Triton's.
    """

    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self):
        launch.check_powers_of_two(self, block_n=16, block_k=32)
        if self.split_k < 1:
            raise ValueError(f"split_k is {self.split_k}; expected at least 1")


def heuristic(inner: int, outputs: int) -> Config:
    """A config that starts about three programs for each of about 132 SMs."""
    config = Config()
    split_k = min(396 // pl.cdiv(outputs, config.block_n), pl.cdiv(inner, config.block_k) // 4, 12)
    return dataclasses.replace(config, split_k=max(1, split_k))


def _cut(inner: int, config: Config) -> tuple[int, int]:
    """Number of K shares, none of them empty, and blocks in each but the last, which may have fewer."""
    blocks = pl.cdiv(inner, config.block_k)
    each = pl.cdiv(blocks, config.split_k)
    return pl.cdiv(blocks, each), each


def _body(q_ref, row_scales_ref, values_ref, scales_ref, out_ref, *, config: Config, each: int, block_m: int):
    rows, inner = q_ref.shape
    outputs = values_ref.shape[0]
    share = pl.program_id(1)
    output = pl.program_id(0) * config.block_n + jnp.arange(config.block_n)
    row = jnp.arange(block_m)
    output_mask, row_mask = output < outputs, row < rows

    def load(ref, down: Array, across: Array, mask: Array) -> Array:
        return plgpu.load(ref.at[down[:, None], across[None, :]], mask=mask, other=0)

    def step(block: Array, total: Array) -> Array:
        k = block * config.block_k + jnp.arange(config.block_k)
        inside = k < inner
        weights = load(values_ref, output, k, output_mask[:, None] & inside[None, :])
        codes = plgpu.load(q_ref.at[row[None, :], k[:, None]], mask=row_mask[None, :] & inside[:, None], other=0)
        return total + plgpu.dot(weights, codes)

    last = jnp.minimum((share + 1) * each, pl.cdiv(inner, config.block_k))
    total = jax.lax.fori_loop(share * each, last, step, jnp.zeros((config.block_n, block_m), jnp.int32))
    scales = plgpu.load(scales_ref.at[output], mask=output_mask, other=0)
    row_scales = plgpu.load(row_scales_ref.at[row], mask=row_mask, other=0)
    plgpu.store(out_ref.at[(share * rows + row)[None, :], output[:, None]],
                total.astype(jnp.float32) * scales[:, None] * row_scales[None, :],
                mask=output_mask[:, None] & row_mask[None, :])


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul_partials(q: Int8[Array, "M K"], row_scales: Float[Array, "M"], values: Int8[Array, "N K"],
                    scales: Float[Array, "N"], *, config: Config, interpret: bool) -> Float[Array, "S M N"]:
    """Scaled partial products over the shares of K; M at most `MAX_ROWS`."""
    (rows, inner), outputs = q.shape, values.shape[0]
    shares, each = _cut(inner, config)
    body = functools.partial(_body, config=config, each=each, block_m=max(8, launch.power_of_two(rows)))
    [out] = launch.call(
        body, (q, row_scales, values, scales), grid=(pl.cdiv(outputs, config.block_n), shares),
        num_warps=config.num_warps, num_stages=config.num_stages, interpret=interpret, name="w8a8",
        out_shape=(jax.ShapeDtypeStruct((shares * rows, outputs), jnp.float32),))
    return out.reshape(shares, rows, outputs)


def _rounded(values: Float[Array, "n"], interpret: bool) -> Float[Array, "n"]:
    """Halves to the even neighbour, for which Pallas has no operation on a GPU."""
    if interpret:
        return jnp.round(values)
    [rounded] = plgpu.elementwise_inline_asm("cvt.rni.f32.f32 $0, $1;", args=[values], constraints="=f,f", pack=1,
                                             result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.float32)])
    return rounded


def _quantise_body(x_ref, codes_ref, scales_ref, *, block: int, interpret: bool):
    row, columns = pl.program_id(0), x_ref.shape[1]
    lanes = jnp.arange(block)
    mask = lanes < columns
    values = plgpu.load(x_ref.at[row, lanes], mask=mask, other=0).astype(jnp.float32)
    largest = jnp.max(jnp.abs(values))
    steps = jnp.where(largest == 0, 0.0, LARGEST / largest)  # a row of zeros stays one
    codes = jnp.minimum(jnp.maximum(_rounded(values * steps, interpret), -LARGEST), LARGEST)
    plgpu.store(codes_ref.at[row, lanes], codes.astype(jnp.int8), mask=mask)
    plgpu.store(scales_ref.at[row], largest / LARGEST)


@functools.partial(jax.jit, static_argnames=("interpret",))
def quantise_rows(x: Float[Array, "M K"], *, interpret: bool) -> tuple[Int8[Array, "M K"], Float[Array, "M"]]:
    """See `api.quantise_rows`; a program per row."""
    rows, columns = x.shape
    block = launch.power_of_two(columns)
    return tuple(launch.call(
        functools.partial(_quantise_body, block=block, interpret=interpret), (x,), grid=(rows,),
        num_warps=min(16, max(1, block // 512)), num_stages=1, interpret=interpret, name="quantise_rows",
        out_shape=(jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32))))
