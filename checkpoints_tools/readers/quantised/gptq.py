"""GPTQ checkpoints (AutoGPTQ, GPTQModel) and AutoRound's: 4-bit symmetric weights in groups along the input.

Layout: qweight i32[K / 8, N] holds q[k, n] in bits 4 (k % 8) of word k // 8; scales [groups, N]; qzeros
i32[groups, N / 8] holds the zero points in the same way along N, less one in the first version of the layout, so that a
symmetric weight has 7 everywhere in that one and 8 in the second; g_idx i32[K] gives the group of each row.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_tools.readers.base import Shape
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.quantised import layouts
from checkpoints_tools.readers.quantised.base import (
    SCALE_TYPES,
    GroupedReader,
    Part,
    check_bits,
    check_divisible,
    check_group_size,
)
from checkpoints_tools.readers.quantised.settings import HOW_IT_WAS_MADE, OF_ACTIVATIONS, check_entries, check_overrides
from specmq_jax.errors import UserError

AUTO_ROUND = ("auto-round", "intel/auto-round")
_ZEROS = {"gptq": 7, "gptq_v2": 8}
_OVERRIDES = ("dynamic", "extra_config", "regex_config")
_KINDS = {"quant_method": str, "method": str, "bits": int, "group_size": int, "sym": bool, "desc_act": bool,
          "static_groups": bool, "meta": dict, "checkpoint_format": str, "format": str, "packing_format": str,
          "pack_dtype": str, "data_type": str, "act_bits": int, **dict.fromkeys(_OVERRIDES, dict)}
_AUTO_ROUND_ZEROS = {"auto_round:auto_gptq": 7, "auto_round:gptq": 7, "auto_round:gptqmodel": 8, "auto_round": 8}
"""What stands for a zero point of 8; the keys are Intel's packing formats (auto_round.inference.backend)."""


class GptqReader(GroupedReader):
    """A Hugging Face directory whose layers' linear weights are GPTQ's or AutoRound's.

    Raises:
      UserError: what `GroupedReader` raises; bits other than 4, zero points other than 8, another layout.
    """

    _main, _order_part = "qweight", "g_idx"

    def __init__(self, directory: pathlib.Path, quantisation: Mapping[str, Any], tensors: TensorFiles | None = None):
        auto_round = quantisation.get("quant_method") in AUTO_ROUND
        self.kind = "AutoRound" if auto_round else "GPTQ"
        self._group_size = check_quantisation(directory, quantisation)
        self._zero = _stored_zero(directory, quantisation, auto_round)
        self._asked_order = asked_order(quantisation)
        super().__init__(directory, tensors)

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        check_divisible(module, shape, 8, 8)
        (rows, columns), groups = shape, self._groups(shape[0])
        return {"qweight": ((rows // 8, columns), ("I32",)), "scales": ((groups, columns), SCALE_TYPES),
                "qzeros": ((groups, columns // 8), ("I32",))}

    def _check_values(self) -> None:
        super()._check_values()
        expected = np.uint32(self._zero * 0x11111111)
        for module in self._quantised:
            if (self._tensors.read(f"{module}.qzeros").view(np.uint32) != expected).any():
                raise UserError(f"{module}.qzeros holds zero points other than 8; only symmetric GPTQ weights (sym = true) "
                                "are read")

    def _codes(self, module: str) -> np.ndarray:
        return layouts.gptq_codes(self._tensors.read(f"{module}.qweight"))

    def _scales(self, module: str) -> np.ndarray:
        return self._tensors.read(f"{module}.scales")


def check_quantisation(directory: pathlib.Path, quantisation: Mapping[str, Any]) -> int:
    """The group size of a GPTQ or AutoRound configuration; one that is not read is a `UserError`."""
    check_entries(f"{directory} has a quantization_config that", quantisation, honoured=_KINDS,
                  ignored=HOW_IT_WAS_MADE | OF_ACTIVATIONS)
    check_bits(directory, quantisation.get("bits"))
    if quantisation.get("sym") is False:
        raise UserError(f"{directory} is quantised with sym = false; only symmetric GPTQ weights are read")
    for key, expected in (("pack_dtype", "int32"), ("data_type", "int")):
        if quantisation.get(key) not in (None, expected):
            raise UserError(f"{directory} has {key} {quantisation[key]!r}; only {expected!r} is read")
    for key in _OVERRIDES:
        check_overrides(directory, key, quantisation.get(key), quantisation)
    activation_bits = quantisation.get("act_bits") or 16
    if activation_bits < 16:
        raise UserError(f"{directory} is made for {activation_bits}-bit activations; GPTQ's layout is read for 16 bits only")
    return check_group_size(directory, quantisation.get("group_size"))


def asked_order(quantisation: Mapping[str, Any]) -> str | None:
    """What says that rows are out of the order of their groups; None where nothing does."""
    static = quantisation.get("static_groups") or (quantisation.get("meta") or {}).get("static_groups")
    return "desc_act = true" if quantisation.get("desc_act") and not static else None


def _stored_zero(directory: pathlib.Path, quantisation: Mapping[str, Any], auto_round: bool) -> int:
    key, known = ("packing_format", _AUTO_ROUND_ZEROS) if auto_round else ("checkpoint_format", _ZEROS)
    layout = quantisation.get(key)
    if not auto_round:
        layout = layout or quantisation.get("format")
    layout = layout or next(iter(known))
    if layout not in known:
        raise UserError(f"{directory} has {key} {layout!r}; read are {', '.join(map(repr, known))}")
    return known[layout]
