"""Draws random logical weights and packs them as toolkits do, each code put where the layout's definition says."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from sources import TINY, random_tensors, write_hf

from checkpoints_tools.readers.base import module_shapes
from specmq_jax.formats import ChannelInt4, ChannelInt8, GroupedInt4, Quantised, TwoLevelInt4
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.parameters import parameter_shapes

SMALL = TINY | {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "head_dim": 32}
"""Its o_proj reads 128 inputs, which are one group of 128."""
Tensors = dict[str, np.ndarray]


class Layout(NamedTuple):
    """How a toolkit writes a module.

    draw: a random weight of K inputs and N outputs; pack: its tensors by the last part of their names.
    quantisation: for config.json, None where it says nothing; linear: the format that the weights are in.
    """

    draw: Callable[[np.random.Generator, int, int], Quantised]
    pack: Callable[[Any], Tensors]
    quantisation: Mapping[str, Any] | None
    linear: str


def write_quantised(directory: pathlib.Path, layout: Layout, *, fused: bool = False, shards: int = 1,
                    change: Callable[[Tensors], None] = lambda tensors: None, settings: Mapping[str, Any] | None = None
                    ) -> dict[str, Quantised]:
    """A directory of SMALL in a layout; returns the weight of each path. `change` may spoil the tensors, `settings` what
    config.json says of them."""
    tensors, expected = quantised_tensors(layout, fused=fused)
    change(tensors)
    quantisation = None if layout.quantisation is None else {**layout.quantisation, **(settings or {})}
    write_hf(directory, SMALL | ({"quantization_config": quantisation} if quantisation else {}), tensors, shards=shards)
    return expected


def quantised_tensors(layout: Layout, *, fused: bool) -> tuple[Tensors, dict[str, Quantised]]:
    """The files' tensors, and the weight of each path of `parameter_shapes`."""
    tensors, expected = random_tensors(SMALL, np.float16), {}
    config, rng = LlamaConfig.from_hf(SMALL), np.random.default_rng(5)
    for path, shape in parameter_shapes(config).items():
        parts = {module: layout.draw(rng, *part) for module, part in module_shapes(config, path, shape, never).items()
                 if module.endswith("_proj")}
        if not parts:
            continue
        weights = list(parts.values())
        expected[path] = weights[0] if len(weights) == 1 else type(weights[0]).beside(weights)
        for module in parts:
            del tensors[f"{module}.weight"]
        if fused:
            parts = {module: expected[path] for module in module_shapes(config, path, shape, always)}
        for module, weight in parts.items():
            tensors |= {f"{module}.{name}": values for name, values in layout.pack(weight).items()}
    return tensors, expected


def never(module: str) -> bool:
    return False


def always(module: str) -> bool:
    return True


def indices(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """k of each row and n of each column, to compute with."""
    return np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]


def put_nibbles(q: np.ndarray, word: np.ndarray, nibble: np.ndarray, count: int) -> np.ndarray:
    """i32[count] words with code q[k, n] in bits 4 nibble[k, n] of word word[k, n]."""
    words = np.zeros(count, np.uint32)
    word, nibble = np.broadcast_arrays(word, nibble, q)[:2]
    np.bitwise_or.at(words, word, q.astype(np.uint32) << (4 * nibble).astype(np.uint32))
    return words.view(np.int32)


def marlin_word(k: np.ndarray, n: np.ndarray, within: np.ndarray, columns: int) -> np.ndarray:
    """The word of a code; `within` is its place among the four threads that share an output."""
    return ((k // 16) * (columns // 64) + n // 64) * 128 + ((n % 8) * 4 + within) * 4 + n % 64 // 16


def interleaved(v: np.ndarray) -> np.ndarray:
    """Even ones first: the nibbles of 0..7 are 0 4 1 5 2 6 3 7."""
    return v // 2 + 4 * (v % 2)


def store(values: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Column n of the values at column[n]."""
    stored = np.empty_like(values)
    stored[:, column] = values
    return stored


def group_column(n: np.ndarray) -> np.ndarray:
    return 64 * (n // 64) + 8 * (n % 8) + n % 64 // 8


def channel_column(n: np.ndarray) -> np.ndarray:
    m = n % 32
    return 32 * (n // 32) + 8 * (m % 8 // 2) + 2 * (m // 8) + m % 2


def codes(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.integers(0, 16, (rows, columns)).astype(np.uint8)


def grouped(size: int, *, act_order: bool = False, dtype: Any = np.float16) -> Callable[..., GroupedInt4]:
    def draw(rng: np.random.Generator, rows: int, columns: int) -> GroupedInt4:
        groups = 1 if size == -1 else -(-rows // size)
        scales = rng.normal(size=(groups, columns)).astype(dtype)
        order = None
        if act_order:  # modules that read the same inputs have the same order
            belongs = np.random.default_rng(rows).permutation(np.arange(rows) // size)
            order = np.argsort(belongs, kind="stable").astype(np.int32)
        scales = scales if dtype == np.float16 else scales.astype(np.float32)
        return GroupedInt4(codes(rng, rows, columns), scales, size, order)
    return draw


def file_rows(weight: GroupedInt4) -> tuple[np.ndarray, np.ndarray]:
    """Codes and groups i32[K] of the rows in the order of the inputs."""
    rows = len(weight.q)
    belongs = np.arange(rows) // (rows if weight.group_size == -1 else weight.group_size)
    if weight.order is None:
        return weight.q, belongs.astype(np.int32)
    inverse = np.argsort(weight.order)
    return weight.q[inverse], belongs[inverse].astype(np.int32)


def pack_gptq(zero: int) -> Callable[[GroupedInt4], Tensors]:
    def pack(weight: GroupedInt4) -> Tensors:
        q, belongs = file_rows(weight)
        rows, columns = q.shape
        k, n = indices(q.shape)
        words = put_nibbles(q, k // 8 * columns + n, k % 8, rows // 8 * columns).reshape(rows // 8, columns)
        zeros = np.full((len(weight.scales), columns // 8), zero * 0x11111111, np.uint32).view(np.int32)
        return {"qweight": words, "scales": weight.scales, "qzeros": zeros, "g_idx": belongs}
    return pack


def pack_compressed(weight: GroupedInt4) -> Tensors:
    q, belongs = file_rows(weight)
    rows, columns = q.shape
    k, n = indices(q.shape)
    words = put_nibbles(q, n * (rows // 8) + k // 8, k % 8, rows // 8 * columns).reshape(columns, rows // 8)
    tensors = {"weight_packed": words, "weight_scale": weight.scales.T.astype(ml_dtypes.bfloat16),
               "weight_shape": np.array([columns, rows], np.int64)}
    return tensors if weight.order is None else tensors | {"weight_g_idx": belongs}


def pack_marlin(weight: GroupedInt4) -> Tensors:
    rows, columns = weight.shape
    k, n = indices(weight.shape)
    v = 4 * (n % 16 // 8) + k % 2 + 2 * (k % 16 // 8)
    words = put_nibbles(weight.q, marlin_word(k, n, k % 8 // 2, columns), interleaved(v), rows * columns // 8)
    column = group_column if weight.group_size != -1 and weight.group_size < rows else channel_column
    return {"qweight": words.reshape(rows // 16, 2 * columns), "scales": store(weight.scales, column(n[0]))}


def draw_qqq(rng: np.random.Generator, rows: int, columns: int) -> ChannelInt4:
    scales = (16 * rng.random(columns)).astype(np.float32)
    return ChannelInt4(codes(rng, rows, columns), scales, 8 * scales)


def draw_qqq_groups(rng: np.random.Generator, rows: int, columns: int) -> TwoLevelInt4:
    group_scales = rng.uniform(0, 20, (rows // 128, columns)).astype(np.float16)  # beyond 127 / 8, as some toolkits write
    return TwoLevelInt4(codes(rng, rows, columns), group_scales, None, rng.random(columns).astype(np.float32), 128)


def pack_qqq(weight: ChannelInt4 | TwoLevelInt4) -> Tensors:
    rows, columns = weight.shape
    k, n = indices(weight.shape)
    word, b, count = marlin_word(k, n, k % 16 // 4, columns), n % 16 // 8, rows * columns // 8
    if isinstance(weight, ChannelInt4):
        signed = (weight.q.astype(np.int8) - 8) & 15
        packed, scales = put_nibbles(signed, word, 2 * (k % 4) + 1 - b, count), weight.scales / 16
        groups = np.empty(0, np.float16)
    else:
        packed, scales = put_nibbles(weight.q, word, interleaved(4 * b + k % 4), count), weight.channel_scales
        groups = store(weight.group_scales, group_column(n[0]))
    return {"B": packed.reshape(rows // 16, 2 * columns), "s_channel": store(scales[None], channel_column(n[0])),
            "s_group": groups}


def draw_int8(rng: np.random.Generator, rows: int, columns: int) -> ChannelInt8:
    return ChannelInt8(rng.integers(-128, 128, (rows, columns)).astype(np.int8),
                       rng.random(columns).astype(np.float16).astype(np.float32))


def pack_int8(scale: str, *shape: int) -> Callable[[ChannelInt8], Tensors]:
    def pack(weight: ChannelInt8) -> Tensors:
        return {"weight": weight.q.T, scale: weight.scales.astype(np.float16).reshape(-1, *shape)}
    return pack


def draw_qoq(rng: np.random.Generator, rows: int, columns: int) -> ChannelInt4:
    scales, offsets = (rng.random(columns).astype(np.float16).astype(np.float32) for _ in range(2))
    return ChannelInt4(codes(rng, rows, columns), scales, offsets)


def draw_qoq_groups(rng: np.random.Generator, rows: int, columns: int) -> TwoLevelInt4:
    """Codes that fit 8 bits with their own group's parameters, and often not with another's."""
    scales = rng.integers(1, 17, (rows // 128, columns))
    zeros = rng.integers(0, np.minimum(128 // scales, 15) + 1)
    q = np.minimum(codes(rng, rows, columns), np.repeat(zeros + 127 // scales, 128, axis=0)).astype(np.uint8)
    return TwoLevelInt4(q, scales.astype(np.uint8), (-zeros * scales).astype(np.int16),
                        rng.random(columns).astype(np.float16).astype(np.float32), 128)


def pack_qoq(kernel_order: bool) -> Callable[[ChannelInt4 | TwoLevelInt4], Tensors]:
    def pack(weight: ChannelInt4 | TwoLevelInt4) -> Tensors:
        rows, columns = weight.shape
        k, n = indices(weight.shape)
        byte = (((n // 32) * (rows // 32) + k // 32) * 512 + ((n % 8) * 4 + k % 16 // 4) * 16 + k % 32 // 16 * 8
                + n % 16 // 8 * 4 + k % 4)
        packed = np.zeros(rows * columns // 2, np.uint8)
        np.bitwise_or.at(packed, byte, weight.q << (4 * (n % 32 // 16)).astype(np.uint8))
        tensors = {"qweight": packed.view(np.int8).reshape(columns, rows // 2)}
        if isinstance(weight, ChannelInt4):
            return tensors | {"s1_scales": weight.scales.astype(np.float16), "s1_szeros": weight.offsets.astype(np.float16)}
        n = n[0]
        column = 32 * (n // 32) + (4 * (n % 8) + n % 32 // 8 if kernel_order else
                                   16 * (n % 32 // 16) + 2 * (n % 8) + n % 16 // 8)
        return tensors | {"s1_scales": weight.channel_scales.astype(np.float16),
                          "s2_scales": store(weight.group_scales, column).view(np.int8),
                          "s2_zeros": store(weight.group_zeros.astype(np.int8), column)}
    return pack


def gptq_settings(size: int, **more: Any) -> dict[str, Any]:
    return {"bits": 4, "group_size": size, "quant_method": "gptq", "sym": True, "desc_act": True, **more}


def compressed_settings(weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None, *, layout: str
                        ) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}


TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
_INT4, _INT8 = {"num_bits": 4, "strategy": "group", "group_size": 128}, {"num_bits": 8, "strategy": "channel"}
_AUTO_ROUND = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16, "quant_method": "auto-round"}
LAYOUTS = {
    "gptq-v1": Layout(grouped(128), pack_gptq(7), gptq_settings(128, checkpoint_format="gptq"), "w4a16"),
    "gptq-v2": Layout(grouped(64), pack_gptq(8), gptq_settings(64, checkpoint_format="gptq_v2"), "w4a16-g64"),
    "gptq-act-order": Layout(grouped(128, act_order=True), pack_gptq(7), gptq_settings(128), "w4a16-act-order"),
    "gptq-v2-act-order": Layout(grouped(32, act_order=True), pack_gptq(8), gptq_settings(32, checkpoint_format="gptq_v2"),
                                "w4a16-g32-act-order"),
    "auto-round-gptq": Layout(grouped(128), pack_gptq(7), _AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}, "w4a16"),
    "auto-round": Layout(grouped(128), pack_gptq(8), _AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}, "w4a16"),
    "marlin": Layout(grouped(128), pack_marlin, gptq_settings(128, static_groups=True), "w4a16"),
    "marlin-channel": Layout(grouped(-1), pack_marlin, gptq_settings(-1), "w4a16-channel"),
    "compressed": Layout(grouped(128, dtype=ml_dtypes.bfloat16), pack_compressed,
                         compressed_settings(_INT4, layout="pack-quantized"), "w4a16"),
    "compressed-act-order": Layout(grouped(128, act_order=True, dtype=ml_dtypes.bfloat16), pack_compressed,
                                   compressed_settings(_INT4 | {"actorder": "group"}, layout="pack-quantized"),
                                   "w4a16-act-order"),
    "compressed-channel": Layout(grouped(-1, dtype=ml_dtypes.bfloat16), pack_compressed, compressed_settings(
        {"num_bits": 4, "strategy": "channel"}, layout="pack-quantized"), "w4a16-channel"),
    "compressed-int8": Layout(draw_int8, pack_int8("weight_scale", 1),
                              compressed_settings(_INT8, TOKENS, layout="int-quantized"), "w8a8"),
    "compressed-int8-alone": Layout(draw_int8, pack_int8("weight_scale", 1),
                                    compressed_settings(_INT8, layout="int-quantized"), "w8a16"),
    "qqq": Layout(draw_qqq, pack_qqq, {"quant_method": "qqq", "wbits": 4, "group_size": -1}, "w4a8-qqq"),
    "qqq-g128": Layout(draw_qqq_groups, pack_qqq, {"quant_method": "qqq", "wbits": 4, "group_size": 128}, "w4a8-qqq-g128"),
    "qserve-int8": Layout(draw_int8, pack_int8("dequant_scale"), None, "w8a8"),
    "qoq": Layout(draw_qoq, pack_qoq(True), None, "w4a8-qoq"),
    "qoq-g128": Layout(draw_qoq_groups, pack_qoq(True), None, "w4a8-qoq-g128"),
    "qoq-g128-late": Layout(draw_qoq_groups, pack_qoq(False), None, "w4a8-qoq-g128"),
}
"""Every layout that is read, by a name of its own."""
