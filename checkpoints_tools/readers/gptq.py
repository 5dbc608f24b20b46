"""GPTQ v1 checkpoints (AutoGPTQ, GPTQModel): 4-bit symmetric weights in groups along the input.

Layout: qweight i32[K / 8, N] holds q[k, n] in bits 4 (k % 8) of word k // 8; scales [groups, N]; qzeros
i32[groups, N / 8] holds zero - 1 in the same way along N, so a symmetric weight has 7 everywhere; g_idx i32[K] gives the
group of each row.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_tools.readers.base import Shape, Stored
from checkpoints_tools.readers.hf import HuggingFaceReader, dense_precision
from specmq_jax import formats
from specmq_jax.checkpoint import Formats
from specmq_jax.errors import UserError
from specmq_jax.formats import GroupedInt4, Logical

_SYMMETRIC = np.int32(0x77777777)
_SCALE_TYPES = ("F16", "BF16", "F32")


class GptqReader(HuggingFaceReader):
    """A Hugging Face directory whose layers' linear weights are GPTQ's.

    Raises:
      UserError: what `HuggingFaceReader` raises; bits other than 4, zero points other than 8, rows out of the order of
        their groups (act-order), another layout than v1.
    """

    kind = "GPTQ"

    def __init__(self, directory: pathlib.Path, quantisation: Mapping[str, Any]):
        self._group_size = _check_quantisation(directory, quantisation)
        super().__init__(directory)
        for module in self.stored:
            if _is_quantised(module):
                self._check_values(module)

    def _find_formats(self) -> Formats:
        embed = dense_precision([self.stored["model.embed_tokens"].type])
        head = self.stored.get("lm_head")
        return Formats.named({"linear": f"w4a16-g{self._group_size}", "embed": embed,
                              "head": dense_precision([head.type]) if head else embed})

    def _holds(self, module: str) -> bool:
        return f"{module}.qweight" in self._tensors.headers

    def _groups(self, rows: int) -> int:
        return 1 if self._group_size == -1 else -(-rows // self._group_size)

    def _check(self, module: str, shape: Shape) -> Stored:
        if not _is_quantised(module):
            return super()._check(module, shape)
        rows, columns = shape
        if rows % 8 or columns % 8:
            raise UserError(f"{module} has shape {list(shape)}; GPTQ packs multiples of 8")
        groups = self._groups(rows)
        parts = {"qweight": ((rows // 8, columns), ("I32",)), "scales": ((groups, columns), _SCALE_TYPES),
                 "qzeros": ((groups, columns // 8), ("I32",))}
        headers = [self._tensors.header(f"{module}.{name}", *expected) for name, expected in parts.items()]
        self._expected |= {f"{module}.{name}" for name in (*parts, "g_idx", "bias")}
        return Stored(f"int4 {'per channel' if self._group_size == -1 else f'g{self._group_size}'}",
                      sum(header.nbytes for header in headers))

    def _check_values(self, module: str) -> None:
        zeros = self._tensors.read(f"{module}.qzeros")
        if (zeros != _SYMMETRIC).any():
            raise UserError(f"{module}.qzeros holds zero points other than 8; only symmetric GPTQ weights (sym = true) "
                            "are read")
        if f"{module}.bias" in self._tensors.headers and self._tensors.read(f"{module}.bias").any():
            raise UserError(f"{module}.bias is not zero; linear layers with a bias are not supported")
        if f"{module}.g_idx" not in self._tensors.headers:
            return
        order = self._tensors.read(f"{module}.g_idx")
        rows = self._tensors.headers[f"{module}.qweight"].shape[0] * 8
        size = rows if self._group_size == -1 else self._group_size
        if not np.array_equal(order, np.arange(rows) // size):
            raise UserError(f"{module}.g_idx puts rows out of the order of their groups (desc_act without static_groups);"
                            " quantise with desc_act = false or static_groups = true")

    def _read_module(self, module: str) -> Logical:
        if not _is_quantised(module):
            return super()._read_module(module)
        q = unpack_rows(self._tensors.read(f"{module}.qweight"))
        return GroupedInt4(q, self._tensors.read(f"{module}.scales"), self._group_size)


def unpack_rows(qweight: np.ndarray) -> np.ndarray:
    """uint8[K, N] of i32[K / 8, N]: row k is bits 4 (k % 8) of word k // 8."""
    words, columns = qweight.shape
    q = np.empty((words, 8, columns), np.uint8)
    for i in range(8):
        q[:, i] = (qweight >> (4 * i)) & 15
    return q.reshape(words * 8, columns)


def _is_quantised(module: str) -> bool:
    return module.endswith("_proj")


def _check_quantisation(directory: pathlib.Path, quantisation: Mapping[str, Any]) -> int:
    layout = quantisation.get("checkpoint_format") or quantisation.get("format") or "gptq"
    if layout != "gptq":
        raise UserError(f"{directory} has GPTQ checkpoint_format {layout!r}; only 'gptq' (v1) is read")
    if quantisation.get("bits") != 4:
        raise UserError(f"{directory} is quantised to {quantisation.get('bits')!r} bits; only 4 are supported")
    if not quantisation.get("sym", True):
        raise UserError(f"{directory} is quantised with sym = false; only symmetric GPTQ weights are read")
    group_size = quantisation.get("group_size", -1)
    known = [f.group_size for f in map(formats.get, formats.names()) if hasattr(f, "group_size")]
    if group_size not in known:
        raise UserError(f"{directory} has GPTQ group_size {group_size!r}; supported are {', '.join(map(str, known))}")
    return group_size
