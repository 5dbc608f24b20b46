"""Checkpoints that SpecMQuant publishes in W4A16: GPTQ's weights, repacked for the Marlin kernel.

Layout: qweight i32[K / 16, 2 N] and scales [groups, N] in the orders of `layouts.marlin_codes`, `layouts.group_scales` and
`layouts.channel_scales`; no zero points; q|k|v and gate|up are one module each. config.json is that of the GPTQ checkpoint
it was made from, so that only the shape of qweight tells the two apart.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_tools.readers.base import Shape
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.quantised import layouts
from checkpoints_tools.readers.quantised.base import SCALE_TYPES, GroupedReader, Part, check_divisible
from checkpoints_tools.readers.quantised.gptq import asked_order, check_quantisation

_TELLING = "model.layers.0.self_attn.o_proj"


def is_marlin(tensors: TensorFiles) -> bool:
    """Whether qweight is in Marlin's order: it has two columns for each column of scales, GPTQ's has one."""
    qweight, scales = (tensors.headers.get(f"{_TELLING}.{name}") for name in ("qweight", "scales"))
    return bool(qweight and scales and len(qweight.shape) == len(scales.shape) == 2
                and qweight.shape[1] == 2 * scales.shape[1])


class MarlinReader(GroupedReader):
    """A directory of W4A16 weights in Marlin's order; errors are `GroupedReader`'s and `gptq.check_quantisation`'s."""

    kind = "GPTQ for Marlin"
    _main, _order_part = "qweight", "g_idx"

    def __init__(self, directory: pathlib.Path, quantisation: Mapping[str, Any], tensors: TensorFiles | None = None):
        self._group_size = check_quantisation(directory, quantisation)
        self._asked_order = asked_order(quantisation)
        super().__init__(directory, tensors)

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        check_divisible(module, shape, 16, 64)
        rows, columns = shape
        return {"qweight": ((rows // 16, 2 * columns), ("I32",)),
                "scales": ((self._groups(rows), columns), SCALE_TYPES)}

    def _optional_parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        return {}

    def _codes(self, module: str) -> np.ndarray:
        return layouts.marlin_codes(self._tensors.read(f"{module}.qweight"))

    def _scales(self, module: str) -> np.ndarray:
        stored = self._tensors.read(f"{module}.scales")
        rows = 16 * self._tensors.headers[f"{module}.qweight"].shape[0]
        # one group that is the whole input is ordered as a channel's scales
        grouped = self._group_size != -1 and self._group_size < rows
        return layouts.group_scales(stored) if grouped else layouts.channel_scales(stored)[None]
