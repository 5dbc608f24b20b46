"""The W4A16 product against expanded weights in f64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import IMPLEMENTATIONS, relative_error
from lowering import cuda_text, launches

from pallas_kernels.transposed import BLOCK_ROWS, MAX_ROWS
from pallas_kernels.w4a16 import (
    Config,
    expansion,
    matmul,
    matmul_partials,
    pack,
    pack_scales,
    packed_shape,
    reference,
    scales_shape,
    unpack,
    unpack_scales,
)

LLAMA_8B = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
LLAMA_70B = [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)]
SMOLLM = [(576, 960), (576, 576), (576, 3072), (1536, 576)]
ROWS = (1, 8, 16, 30, 48, 60, 64, 128, 200)


def expand(q: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    """f64 weights from codes and scales, group by group."""
    weights = np.empty(q.shape)
    size = q.shape[0] if group_size == -1 else group_size
    for group, scale in enumerate(scales.astype(np.float64)):
        rows = slice(group * size, (group + 1) * size)
        weights[rows] = (q[rows].astype(np.float64) - 8) * scale
    return weights


def problem(rows: int, inner: int, columns: int, group_size: int, dtype):
    """x, packed and scales of both signs, and x @ w in f64."""
    rng = np.random.default_rng([rows, inner, columns, group_size + 1])
    q = rng.integers(0, 16, (inner, columns), dtype=np.uint8)
    groups = 1 if group_size == -1 else -(-inner // group_size)
    scales = (rng.normal(size=(groups, columns)) * 0.02).astype(np.float16)
    x = jnp.asarray(rng.normal(size=(rows, inner)), dtype)
    expected = np.asarray(x.astype(jnp.float32)).astype(np.float64) @ expand(q, scales, group_size)
    scales = jnp.asarray(scales)
    return (x, pack(jnp.asarray(q)), scales.astype(jnp.float32) if group_size == -1 else pack_scales(scales)), expected


def products(group_size: int, config: Config | None, implementation: str):
    """`matmul_partials` and `matmul` of the same operands, compiled as one."""
    options = {"group_size": group_size, "config": config, "implementation": implementation}
    return jax.jit(lambda *operands: (matmul_partials(*operands, **options), matmul(*operands, **options)))


def check(shape: tuple, dtype, config: Config | None, implementation: str) -> None:
    rows, *_, group_size = shape
    operands, expected = problem(*shape, dtype)
    partials, product = products(group_size, config, implementation)(*operands)
    assert partials.dtype == jnp.float32
    # weights scaled in a half precision are rounded once more
    scale_planes = config.scale_planes if config else rows > BLOCK_ROWS
    most = MAX_ROWS if group_size == 128 and dtype == jnp.float16 else 2 * BLOCK_ROWS
    rounded = dtype != jnp.float32 and (rows > most or scale_planes)
    tolerance = 2e-5 if not rounded else 3e-4 if dtype == jnp.float16 else 3e-3
    assert relative_error(np.asarray(partials, np.float64).sum(0), expected) < tolerance
    assert product.dtype == dtype
    assert relative_error(product.astype(jnp.float32), expected) < (4e-3 if dtype == jnp.bfloat16 else 5e-4)


@pytest.mark.parametrize("inner", [1, 127, 128, 576])
def test_unpack_inverts_pack(inner):
    q = np.random.default_rng(inner).integers(0, 16, (inner, 5), dtype=np.uint8)
    packed = jax.jit(pack)(jnp.asarray(q))
    assert packed.shape == packed_shape(inner, 5) == (-(-inner // 128), 5, 16)
    np.testing.assert_array_equal(jax.jit(unpack, static_argnums=1)(packed, inner), q)


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_unpack_scales_inverts_pack_scales(groups):
    scales = np.random.default_rng(groups).normal(size=(groups, 5)).astype(np.float16)
    scales[0, :2] = -65504, 6e-8  # the largest, and one without full precision
    words = pack_scales(jnp.asarray(scales))
    assert (words.shape, words.dtype) == ((-(-groups // 2), 5), jnp.int32)
    np.testing.assert_array_equal(unpack_scales(words, groups), scales.astype(np.float32))
    np.testing.assert_array_equal(pack_scales(jnp.asarray(scales, jnp.float32)), words)


def test_padding_has_weight_zero():
    q = unpack(pack(jnp.zeros((1, 3), jnp.uint8)), 128)
    np.testing.assert_array_equal(q[1:], 8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "config"), [
    ((1, 576, 40, 128), Config(block_n=32)),
    ((7, 320, 32, 64), Config(block_n=16, split_k=2)),
    ((16, 384, 48, 32), Config(block_n=32, split_k=2)),
    ((30, 200, 20, -1), Config(block_n=16, split_k=5)),
    ((60, 130, 16, 128), Config(block_n=16)),
    ((5, 300, 24, -1), None),
    ((3, 290, 48, 64), Config(block_n=16, split_k=3)),
    ((9, 384, 40, 32), Config(block_n=32, scale_planes=True)),
    ((60, 300, 32, 128), Config(block_n=32, split_k=2, scale_planes=True)),
    ((33, 300, 24, 64), Config(block_n=16, split_k=2)),
    ((48, 256, 32, 128), Config(block_n=16, scale_planes=True)),
    ((200, 300, 32, 128), Config(block_m=128, block_n=32, split_k=2, scale_planes=True)),
    ((300, 200, 24, 128), Config(block_m=256, block_n=16)),
    ((10, 200, 24, -1), Config(block_m=256, block_n=16)),
    ((90, 300, 24, 128), Config(block_m=128, block_n=16)),  # 64 and 32 rows
    ((190, 300, 24, 32), Config(block_m=256, block_n=16, scale_planes=True)),  # 128 and 64
    ((70, 300, 24, -1), Config(block_m=128, block_n=16)),
    ((12, 300, 24, 64), Config(block_n=16, split_k=2)),
])
def test_ragged_sizes_groups_and_cuts(shape, config, implementation):
    check(shape, jnp.float16, config, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pipelined_scales", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("inner", [384, 400])  # odd and even numbers of groups, whole and short ones
def test_scales_loaded_with_their_weights_or_before(inner, group_size, pipelined_scales, implementation):
    for scale_planes in (False, True):
        config = Config(block_n=32, split_k=2, num_warps=2, pipelined_scales=pipelined_scales, scale_planes=scale_planes)
        check((9, inner, 40, group_size), jnp.float16, config, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_other_activations(dtype, implementation):
    check((3, 200, 24, 64), dtype, Config(block_n=32), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [150, 520])
def test_prompt_sized_inputs(rows, dtype, group_size, implementation):
    check((rows, 200, 70, group_size), dtype, None, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(600, 70), (4096, 6144), (4096, 4096), (14336, 4096)])
@pytest.mark.parametrize("group_size", [64, 128, -1])
def test_reproducible_rows_have_the_same_bits_in_every_block_of_rows_on_gpu(sizes, group_size):
    (x, packed, scales), _ = problem(512, *sizes, group_size, jnp.float16)
    product = functools.partial(matmul_partials, packed=packed, scales=scales, group_size=group_size, reproducible=True)
    whole = product(x)
    for rows in (slice(0, 1), slice(30, 90), slice(60, 124), slice(99, 100), slice(200, 460)):
        np.testing.assert_array_equal(product(x[rows]), whole[:, rows])


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_weights_of_a_prompt_are_rounded_once(group_size, interpret):
    (_, packed, scales), _ = problem(1, 300, 70, group_size, jnp.float16)
    found = expansion.dequantise(packed, scales, inner=300, group_size=group_size, dtype=jnp.float16, interpret=interpret)
    weights = reference.dequantise(packed, scales, 300, group_size)
    np.testing.assert_array_equal(found, weights.astype(jnp.float16).T)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accumulates_beyond_the_range_of_half_precision(implementation):
    x = jnp.full((1, 256), 200, jnp.float16)
    packed = pack(jnp.concatenate([jnp.full((128, 16), 15, jnp.uint8), jnp.full((128, 16), 1, jnp.uint8)]))
    product = matmul(x, packed, pack_scales(jnp.ones((2, 16), jnp.float16)), group_size=128, implementation=implementation)
    np.testing.assert_array_equal(product, 0)  # 179200 - 179200


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("inline_asm", [True, False])
@pytest.mark.parametrize("scale_planes", [True, False])
def test_every_form_of_the_kernel_on_gpu(scale_planes, inline_asm, group_size, dtype):
    cuts = [(64, 32, 3, 1), (64, 64, 1, 4), (128, 128, 2, 8), (256, 128, 1, 8), (64, 256, 1, 8)]
    for place, rows in enumerate((1, 12, 30, 48, 64, 90, 190, 500)):
        for block_m, block_n, split_k, num_warps in (cuts[place % 5], cuts[(place + 2) % 5]):
            config = Config(block_m=block_m, block_n=block_n, split_k=split_k, num_warps=num_warps, num_stages=3,
                            scale_planes=scale_planes, inline_asm=inline_asm)
            check((rows, 1120, 200, group_size), dtype, config, "kernel")


@pytest.mark.gpu
@pytest.mark.parametrize(("inner", "columns"), LLAMA_8B + LLAMA_70B + SMOLLM)
def test_real_sizes_on_gpu(inner, columns):
    """A sample of columns, the last ones included, against f64."""
    keys = jax.random.split(jax.random.key(0), 3)
    packed = jax.random.bits(keys[0], packed_shape(inner, columns), jnp.uint32).view(jnp.int32)
    plain_scales = (jax.random.normal(keys[1], (-(-inner // 128), columns)) * 0.02).astype(jnp.float16)
    scales = pack_scales(plain_scales)
    sample = np.unique(np.r_[:64, columns - 64:columns, np.random.default_rng(0).integers(0, columns, 128)])
    weights = expand(np.asarray(unpack(packed[:, sample], inner)), np.asarray(plain_scales[:, sample]), 128)
    errors = {}
    for rows in ROWS:
        x = jax.random.normal(keys[2], (rows, inner), jnp.float16)
        expected = np.asarray(x).astype(np.float64) @ weights
        for function in (matmul, matmul_partials):
            out = function(x, packed, scales, group_size=128, implementation="kernel")
            out = out if out.ndim == 2 else out.sum(0)
            errors[rows, function.__name__] = relative_error(out[:, sample], expected)
    assert all(error < 2e-3 for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("config", [None, Config(block_n=128, num_warps=4, num_stages=3, scale_planes=True),
                                    Config(block_m=128, block_n=128, num_warps=8, num_stages=3, scale_planes=True)])
def test_runs_give_the_same_bits_on_gpu(config, group_size):
    """Registers that are overwritten under a product show so."""
    for rows in (16, 64, 512):
        operands, expected = problem(rows, 14336, 512, group_size, jnp.float16)
        first, *others = (matmul_partials(*operands, group_size=group_size, config=config, implementation="kernel")
                          for _ in range(4))
        assert relative_error(np.asarray(first, np.float64).sum(0), expected) < 2e-3
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize(("inner", "columns"), LLAMA_8B + LLAMA_70B + SMOLLM + [(130, 1), (128, 17), (64, 100)])
def test_lowers_to_one_launch(inner, columns):
    for rows, dtype in [(1, jnp.float16), (16, jnp.bfloat16), (30, jnp.float16), (48, jnp.float16), (60, jnp.bfloat16),
                        (100, jnp.float16), (300, jnp.float16)]:
        avals = (jax.ShapeDtypeStruct((rows, inner), dtype),
                 jax.ShapeDtypeStruct(packed_shape(inner, columns), jnp.int32),
                 scales_shape(inner, columns, 128))
        text = cuda_text(lambda *operands: matmul_partials(*operands, group_size=128, implementation="kernel"), *avals)
        assert launches(text) == 1


@pytest.mark.parametrize("pipelined_scales", [True, False])
@pytest.mark.parametrize("inline_asm", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_form_lowers(group_size, inline_asm, pipelined_scales):
    def product(config, *operands):
        return matmul(*operands, group_size=group_size, config=config, implementation="kernel")

    for rows, dtype, scale_planes in ((3, jnp.float16, True), (30, jnp.float16, False), (30, jnp.bfloat16, False),
                                     (100, jnp.float32, False)):
        config = Config(split_k=3, num_warps=4, scale_planes=scale_planes, pipelined_scales=pipelined_scales,
                        inline_asm=inline_asm)
        avals = (jax.ShapeDtypeStruct((rows, 576), dtype), jax.ShapeDtypeStruct(packed_shape(576, 960), jnp.int32),
                 scales_shape(576, 960, group_size))
        assert launches(cuda_text(functools.partial(product, config), *avals)) == 1


def test_names_the_offending_array():
    (x, packed, scales), _ = problem(2, 200, 8, 64, jnp.float16)
    with pytest.raises(ValueError, match=r"x is int32\[2, 200\]"):
        matmul(x.astype(jnp.int32), packed, scales, group_size=64)
    with pytest.raises(ValueError, match=r"packed is int32\[1, 8, 16\]; expected int32\[2, N, 16\] for K = 200"):
        matmul(x, packed[:1], scales, group_size=64)
    with pytest.raises(ValueError, match=r"scales are int32\[2, 8\]; expected int32\[1, 8\] for K = 200"):
        matmul(x, packed, scales, group_size=128)
    with pytest.raises(ValueError, match=r"scales are float32\[4, 8\]; expected int32\[2, 8\] for K = 200"):
        matmul(x, packed, unpack_scales(scales, 4), group_size=64)
    with pytest.raises(ValueError, match=r"scales are int32\[2, 8\]; expected float16 or float32 \[G, N\]"):
        pack_scales(scales)
    with pytest.raises(ValueError, match=r"words are int32\[2, 8\]; expected int32\[3, N\] for 5 groups"):
        unpack_scales(scales, 5)
    with pytest.raises(ValueError, match="group_size is 48; expected one of"):
        matmul(x, packed, scales, group_size=48)
    with pytest.raises(ValueError, match=r"q is int32\[4, 4\]; expected uint8\[K, N\]"):
        pack(jnp.zeros((4, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"for K = 300"):
        unpack(packed, 300)


@pytest.mark.parametrize("fields", [{"block_n": 24}, {"least_rows": 4}, {"split_k": 0}])
def test_config_names_the_offending_field(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        Config(**fields)
