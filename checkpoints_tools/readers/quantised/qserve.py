"""QServe checkpoints (mit-han-lab/omniserve, deepcompressor; arXiv:2405.04532): QoQ's W4A8 and W8A8.

Layout of QoQ: qweight int8[N, K / 2] in the order of `layouts.qserve_codes`, s1_scales [N]. Per channel s1_szeros [N], and
w = q s1_scales[n] - s1_szeros[n]. With groups of 128 s2_scales and s2_zeros int8[groups, N] in one of the two orders of
`layouts.qserve_group_parameters`, and w = (q s2_scales[g, n] + s2_zeros[g, n]) s1_scales[n], in which scales are read as
unsigned, zeros are -(zero scale) modulo 256, and the sum fits 8 bits.

Layout of W8A8: weight int8[N, K], dequant_scale [N]. Modules may be fused. config.json tells nothing, tensors' names do.
"""

import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int8, Int16, UInt8

from checkpoints_tools.readers.base import Shape
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.quantised import layouts
from checkpoints_tools.readers.quantised.base import SCALE_TYPES, Part, QuantisedReader, check_divisible
from specmq_jax.errors import UserError
from specmq_jax.formats import ChannelInt4, ChannelInt8, TwoLevelInt4

_GROUP_SIZE = 128
_BYTES = ("I8", "U8")


class QServeInt8Reader(QuantisedReader):
    """A directory of W8A8 weights; errors are `QuantisedReader`'s."""

    kind, _main, _type = "QServe W8A8", "dequant_scale", "int8 per channel"

    def _linear_format(self) -> str:
        return "w8a8"

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        return {"weight": (shape[::-1], ("I8",)), "dequant_scale": ((shape[1],), SCALE_TYPES)}

    def _read_integers(self, module: str) -> ChannelInt8:
        return ChannelInt8(self._tensors.read(f"{module}.weight").T,
                           self._tensors.read(f"{module}.dequant_scale").astype(np.float32))


class QoqReader(QuantisedReader):
    """A directory of QoQ weights, per channel or in groups of 128.

    Raises:
      UserError: what `QuantisedReader` raises; parameters of groups that leave 8 bits in either order.
    """

    kind, _main = "QServe QoQ", "qweight"

    def __init__(self, directory: pathlib.Path, tensors: TensorFiles):
        self._grouped = any(name.endswith(".s2_scales") for name in tensors.headers)
        self._type = "int4 for int8, " + (f"g{_GROUP_SIZE}" if self._grouped else "per channel")
        super().__init__(directory, tensors)

    def _linear_format(self) -> str:
        return "w4a8-qoq" + (f"-g{_GROUP_SIZE}" if self._grouped else "")

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        check_divisible(module, shape, _GROUP_SIZE if self._grouped else 32, 32)
        rows, columns = shape
        parts = {"qweight": ((columns, rows // 2), _BYTES), "s1_scales": ((columns,), SCALE_TYPES)}
        if not self._grouped:
            return parts | {"s1_szeros": ((columns,), SCALE_TYPES)}
        groups = rows // _GROUP_SIZE, columns
        return parts | {"s2_scales": (groups, _BYTES), "s2_zeros": (groups, _BYTES)}

    def _check_values(self) -> None:
        super()._check_values()
        self._kernel_order = self._find_order() if self._grouped else True

    def _find_order(self) -> bool:
        """Whether group parameters are in the kernel's order, by the first module that fits one order only."""
        for module in self._quantised:
            q = layouts.qserve_codes(self._tensors.read(f"{module}.qweight"))
            kernel, other = (_fits(q, *self._group_parameters(module, kernel_order)) for kernel_order in (True, False))
            if kernel != other:
                return kernel
            if not kernel:
                raise self._overflow(module)
        return True

    def _group_parameters(self, module: str, kernel_order: bool) -> tuple[UInt8[np.ndarray, "G N"], Int16[np.ndarray, "G N"]]:
        scales, zeros = (layouts.qserve_group_parameters(self._tensors.read(f"{module}.{name}"), kernel_order=kernel_order)
                         for name in ("s2_scales", "s2_zeros"))
        return scales.view(np.uint8), _unwrapped(zeros.view(np.int8))

    def _overflow(self, module: str) -> UserError:
        return UserError(f"{module}.s2_scales and s2_zeros take its codes beyond 8 bits: the checkpoint is damaged, or its "
                         "groups' parameters are in an order that is not known")

    def _read_integers(self, module: str) -> ChannelInt4 | TwoLevelInt4:
        q = layouts.qserve_codes(self._tensors.read(f"{module}.qweight"))
        scales = self._tensors.read(f"{module}.s1_scales").astype(np.float32)
        if not self._grouped:
            return ChannelInt4(q, scales, self._tensors.read(f"{module}.s1_szeros").astype(np.float32))
        group_scales, group_zeros = self._group_parameters(module, self._kernel_order)
        if not _fits(q, group_scales, group_zeros):
            raise self._overflow(module)
        return TwoLevelInt4(q, group_scales, group_zeros, scales, _GROUP_SIZE)


def _unwrapped(zeros: Int8[np.ndarray, "G N"]) -> Int16[np.ndarray, "G N"]:
    """-255 to 0: a zero point takes codes down, never up."""
    wide = zeros.astype(np.int16)
    return np.where(wide > 0, wide - 256, wide)


def _fits(q: UInt8[np.ndarray, "K N"], scales: UInt8[np.ndarray, "G N"], zeros: Int16[np.ndarray, "G N"]) -> bool:
    """Whether every q * scale + zero is an 8-bit integer, which the lowest and the highest code of a group decide."""
    grouped = q.reshape(len(scales), -1, q.shape[1])
    low, high = (codes.astype(np.int16) * scales + zeros for codes in (grouped.min(axis=1), grouped.max(axis=1)))
    return low.min() >= -128 and high.max() <= 127
