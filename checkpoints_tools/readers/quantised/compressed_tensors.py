"""compressed-tensors checkpoints (llmcompressor, AutoRound): W4A16 as "pack-quantized", W8A8 and W8A16 as "int-quantized".

Layout of W4A16: weight_packed i32[N, K / 8] in the order of `layouts.compressed_codes`, weight_scale [N, groups],
weight_shape i64[2] = N, K; weight_g_idx i32[K], where there is one, gives the group of each input.
Layout of W8A8: weight int8[N, K], weight_scale [N, 1].
"""

import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from checkpoints_tools.readers.base import Reader, Shape
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.files.weight_files import shown
from checkpoints_tools.readers.quantised import layouts
from checkpoints_tools.readers.quantised.base import (
    SCALE_TYPES,
    GroupedReader,
    Part,
    QuantisedReader,
    check_bits,
    check_divisible,
    check_group_size,
)
from checkpoints_tools.readers.quantised.settings import check_entries
from specmq_jax.errors import UserError
from specmq_jax.formats import ChannelInt8

_IGNORED = ("quantization_status", "global_compression_ratio", "version", "run_compressed", "dequantize",
            "use_optimized_inference", "provider", "autoround_version")
_IN_ORDER, _OUT_OF_ORDER = (None, False, "weight", "static"), (True, "group", "dynamic")
"""Values of actorder: whether groups are of neighbouring inputs."""
_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def open_compressed(directory: pathlib.Path, quantisation: Mapping[str, Any], tensors: TensorFiles) -> Reader:
    """The reader for what a quantization_config of method compressed-tensors describes, else a `UserError`."""
    where = f"{directory} has a quantization_config that"
    for key in ("kv_cache_scheme", "transform_config"):
        if quantisation.get(key):
            raise UserError(f"{directory} has a {key}, which is not supported")
    check_entries(where, quantisation, ignored=_IGNORED, honoured={
        "quant_method": str, "format": str, "config_groups": object, "ignore": list, "sparsity_config": dict})
    sparsity = (quantisation.get("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        raise UserError(f"{directory} has a sparsity_config of format {sparsity!r}; only 'dense' is read")
    group = _only_group(directory, quantisation)
    weights, activations = (group.get(key) or {} for key in ("weights", "input_activations"))
    _check_scheme(directory, "weights", weights, {"type": "int", "symmetric": True, "dynamic": False}, ("actorder",))
    layout, strategy = quantisation.get("format"), weights.get("strategy")
    if group.get("format") not in (None, layout):
        raise UserError(f"{directory} has format {layout!r}, and its config_groups have {group['format']!r}; expected one")
    kept = tuple(name for name in quantisation.get("ignore") or () if isinstance(name, str))
    if layout == "pack-quantized":
        check_bits(directory, weights.get("num_bits"))
        if activations:
            raise UserError(f"{directory} quantises the activations of 4-bit weights, which is not supported")
        _check_strategy(directory, strategy, ("group", "channel"))
        group_size = -1 if strategy == "channel" else check_group_size(directory, weights.get("group_size"))
        _check_size(directory, "weights", weights)
        return CompressedInt4Reader(directory, group_size, tensors, kept, weights.get("actorder"))
    if layout == "int-quantized":
        if weights.get("num_bits") != 8:
            raise UserError(f"{directory} is quantised to {weights.get('num_bits')!r} bits as {layout!r}; only 8 are supported")
        _check_strategy(directory, strategy, ("channel",))
        _check_size(directory, "weights", weights)
        if activations:
            _check_scheme(directory, "input_activations", activations, _DYNAMIC_INT8, required=True)
            _check_size(directory, "input_activations", activations)
        return CompressedInt8Reader(directory, "w8a8" if activations else "w8a16", tensors, kept)
    raise UserError(f"{directory} has compressed-tensors format {layout!r}; read are 'pack-quantized' and 'int-quantized'")


def _only_group(directory: pathlib.Path, quantisation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one of config_groups; it must be meant for linear layers."""
    groups = quantisation.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError(f"{directory} has malformed config_groups; expected an object for each group")
    if len(groups) != 1:
        raise UserError(f"{directory} has {len(groups)} config_groups; models of mixed precisions are not read")
    (group,) = groups.values()
    if group.get("output_activations"):
        raise UserError(f"{directory} quantises outputs (output_activations), which is not supported")
    check_entries(f"{directory} has config_groups that", group, ignored=(), honoured={
        "targets": list, "weights": dict, "input_activations": dict, "format": str})
    for target in group.get("targets") or ():
        if not isinstance(target, str) or not (target == "Linear" or target.startswith("re:") or target.endswith("_proj")
                                               or target == "lm_head"):
            raise UserError(f"{directory} quantises {shown(repr(target))} (targets); only linear layers' weights are read")
    return group


def _check_scheme(directory: pathlib.Path, part: str, scheme: Mapping[str, Any], expected: Mapping[str, Any],
                  others: tuple[str, ...] = (), *, required: bool = False) -> None:
    """Refuses a scheme whose entries are not as expected, where they may be absent unless `required`; the caller looks at the
    `others`."""
    check_entries(f"{directory} has {part} that", scheme, ignored=("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
                  honoured={"num_bits": int, "group_size": int, "strategy": str, **dict.fromkeys((*expected, *others), object)})
    for key, value in expected.items():
        found = scheme.get(key) if required else scheme.get(key, value)
        if found != value or type(found) is not type(value):
            raise UserError(f"{directory} has {part} with {key} = {shown(repr(found))}; only {value!r} is read")


def _check_size(directory: pathlib.Path, part: str, scheme: Mapping[str, Any]) -> None:
    if scheme.get("strategy") != "group" and scheme.get("group_size") not in (None, -1):
        raise UserError(f"{directory} has {part} with strategy {scheme.get('strategy')!r} and group_size "
                        f"{scheme['group_size']!r}; expected none")


def _check_strategy(directory: pathlib.Path, strategy: Any, known: tuple[str, ...]) -> None:
    if strategy not in known:
        raise UserError(f"{directory} has weights with strategy {strategy!r}; read are {', '.join(map(repr, known))}")


class CompressedInt4Reader(GroupedReader):
    """A directory of W4A16 weights; errors are `GroupedReader`'s."""

    kind = "compressed-tensors"
    _main, _order_part = "weight_packed", "weight_g_idx"

    def __init__(self, directory: pathlib.Path, group_size: int, tensors: TensorFiles, kept: Collection[str] = (),
                 act_order: Any = None):
        """
        Args:
          directory: that holds the files.
          group_size: rows that share a scale, -1 for all.
          tensors: the directory's.
          kept: names of modules that config.json says are not quantised.
          act_order: what config.json says of the order of rows.
        """
        if act_order not in (*_IN_ORDER, *_OUT_OF_ORDER):
            raise UserError(f"{directory} has weights with actorder = {shown(repr(act_order))}; read are None, 'group' and "
                            "'weight'")
        self._group_size, self._kept = group_size, kept
        self._asked_order = f"actorder = {act_order!r}" if act_order in _OUT_OF_ORDER else None
        super().__init__(directory, tensors)

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        check_divisible(module, shape, 8, 1)
        rows, columns = shape
        return {"weight_packed": ((columns, rows // 8), ("I32",)), "weight_shape": ((2,), ("I64", "I32")),
                "weight_scale": ((columns, self._groups(rows)), SCALE_TYPES)}

    def _check_values(self) -> None:
        super()._check_values()
        _check_kept(self._quantised, self._kept)
        for module, order in self._orders.items():
            if order is not None and not self._asked_order:
                raise UserError(f"{module}.weight_g_idx puts rows out of the order of their groups, and config.json has no "
                                "actorder = 'group' that says so")
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

    def __init__(self, directory: pathlib.Path, linear: str, tensors: TensorFiles, kept: Collection[str] = ()):
        self._linear, self._kept = linear, kept
        super().__init__(directory, tensors)

    def _check_values(self) -> None:
        super()._check_values()
        _check_kept(self._quantised, self._kept)

    def _linear_format(self) -> str:
        return self._linear

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        return {"weight": (shape[::-1], ("I8",)), "weight_scale": ((shape[1], 1), SCALE_TYPES)}

    def _read_integers(self, module: str) -> ChannelInt8:
        return ChannelInt8(self._tensors.read(f"{module}.weight").T,
                           self._tensors.read(f"{module}.weight_scale")[:, 0].astype(np.float32))


def _check_kept(quantised: Iterable[str], kept: Collection[str]) -> None:
    for module in quantised:
        if module in kept:
            raise UserError(f"{module} is quantised, and config.json says that it is not (ignore)")
