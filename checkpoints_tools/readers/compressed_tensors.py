"""compressed-tensors checkpoints (llmcompressor, AutoRound): W4A16 as "pack-quantized", W8A8 and W8A16 as "int-quantized".

Layout of W4A16: weight_packed i32[N, K / 8] in the order of `layouts.compressed_codes`, weight_scale [N, groups],
weight_shape i64[2] = N, K; weight_g_idx i32[K], where there is one, gives the group of each input.
Layout of W8A8: weight int8[N, K], weight_scale [N, 1].
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_tools.readers import layouts
from checkpoints_tools.readers.base import Reader, Shape
from checkpoints_tools.readers.quantised import (
    SCALE_TYPES,
    GroupedReader,
    Part,
    QuantisedReader,
    check_bits,
    check_divisible,
    check_group_size,
)
from checkpoints_tools.readers.tensor_files import TensorFiles
from specmq_jax.errors import UserError
from specmq_jax.formats import ChannelInt8

_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def open_compressed(directory: pathlib.Path, quantisation: Mapping[str, Any], tensors: TensorFiles) -> Reader:
    """The reader for what a quantization_config of method compressed-tensors describes, else a `UserError`."""
    groups = quantisation.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError(f"{directory} has malformed config_groups; expected an object for each group")
    if len(groups) != 1:
        raise UserError(f"{directory} has {len(groups)} config_groups; models of mixed precisions are not read")
    for key in ("kv_cache_scheme", "transform_config"):
        if quantisation.get(key):
            raise UserError(f"{directory} has a {key}, which is not supported")
    (group,) = groups.values()
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    if group.get("output_activations"):
        raise UserError(f"{directory} quantises outputs (output_activations), which is not supported")
    for key, expected in (("type", "int"), ("symmetric", True), ("dynamic", False)):
        if weights.get(key, expected) != expected:
            raise UserError(f"{directory} has weights with {key} = {weights[key]!r}; only {expected!r} is read")
    layout, strategy = quantisation.get("format"), weights.get("strategy")
    if layout == "pack-quantized":
        check_bits(directory, weights.get("num_bits"))
        if activations:
            raise UserError(f"{directory} quantises the activations of 4-bit weights, which is not supported")
        _check_strategy(directory, strategy, ("group", "channel"))
        group_size = -1 if strategy == "channel" else check_group_size(directory, weights.get("group_size"))
        return CompressedInt4Reader(directory, group_size, tensors)
    if layout == "int-quantized":
        if weights.get("num_bits") != 8:
            raise UserError(f"{directory} is quantised to {weights.get('num_bits')!r} bits as {layout!r}; only 8 are supported")
        _check_strategy(directory, strategy, ("channel",))
        for key, expected in _DYNAMIC_INT8.items() if activations else ():
            if activations.get(key) != expected:
                raise UserError(f"{directory} has input_activations with {key} = {activations.get(key)!r}; only "
                                f"{expected!r} is read")
        return CompressedInt8Reader(directory, "w8a8" if activations else "w8a16", tensors)
    raise UserError(f"{directory} has compressed-tensors format {layout!r}; read are 'pack-quantized' and 'int-quantized'")


def _check_strategy(directory: pathlib.Path, strategy: Any, known: tuple[str, ...]) -> None:
    if strategy not in known:
        raise UserError(f"{directory} has weights with strategy {strategy!r}; read are {', '.join(map(repr, known))}")


class CompressedInt4Reader(GroupedReader):
    """A directory of W4A16 weights; errors are `GroupedReader`'s."""

    kind = "compressed-tensors"
    _main, _order_part = "weight_packed", "weight_g_idx"

    def __init__(self, directory: pathlib.Path, group_size: int, tensors: TensorFiles):
        self._group_size = group_size
        super().__init__(directory, tensors)

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        check_divisible(module, shape, 8, 1)
        rows, columns = shape
        return {"weight_packed": ((columns, rows // 8), ("I32",)), "weight_shape": ((2,), ("I64", "I32")),
                "weight_scale": ((columns, self._groups(rows)), SCALE_TYPES)}

    def _check_values(self) -> None:
        super()._check_values()
        for module in self._quantised:
            columns, words = self._tensors.headers[f"{module}.weight_packed"].shape
            found = self._tensors.read(f"{module}.weight_shape").tolist()
            if found != [columns, 8 * words]:
                raise UserError(f"tensor {module}.weight_shape holds {found}; config.json asks for {[columns, 8 * words]}")

    def _codes(self, module: str) -> np.ndarray:
        return layouts.compressed_codes(self._tensors.read(f"{module}.weight_packed"))

    def _scales(self, module: str) -> np.ndarray:
        return np.ascontiguousarray(self._tensors.read(f"{module}.weight_scale").T)


class CompressedInt8Reader(QuantisedReader):
    """A directory of W8A8 or W8A16 weights, as `linear` says; errors are `QuantisedReader`'s."""

    kind, _main, _type = "compressed-tensors", "weight_scale", "int8 per channel"

    def __init__(self, directory: pathlib.Path, linear: str, tensors: TensorFiles):
        self._linear = linear
        super().__init__(directory, tensors)

    def _linear_format(self) -> str:
        return self._linear

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        return {"weight": (shape[::-1], ("I8",)), "weight_scale": ((shape[1], 1), SCALE_TYPES)}

    def _read_integers(self, module: str) -> ChannelInt8:
        return ChannelInt8(self._tensors.read(f"{module}.weight").T,
                           self._tensors.read(f"{module}.weight_scale")[:, 0].astype(np.float32))
