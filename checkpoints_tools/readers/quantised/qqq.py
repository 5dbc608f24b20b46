"""QQQ checkpoints (HandH1998/QQQ, GPTQModel, SpecMQuant's fused ones): 4-bit weights for 8-bit activations.

Layout: B i32[K / 16, 2 N] in the order of `layouts.qqq_codes`; s_channel f32[1, N]; s_group f16[groups, N], empty or absent
without groups. Without groups w = (q - 8) 16 s_channel[n], since the kernel multiplies codes that it shifted left by four;
with groups w = round((q - 8) s_group[g, n]) s_channel[n].
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from checkpoints_tools.readers.base import Shape
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.quantised import layouts
from checkpoints_tools.readers.quantised.base import Part, QuantisedReader, check_bits, check_divisible
from checkpoints_tools.readers.quantised.gptq import asked_order
from checkpoints_tools.readers.quantised.settings import HOW_IT_WAS_MADE, check_entries, check_overrides
from specmq_jax.errors import UserError
from specmq_jax.formats import ChannelInt4, TwoLevelInt4

_GROUP_SIZES = (-1, 128)
_KINDS = {"quant_method": str, "method": str, "bits": int, "wbits": int, "group_size": int, "sym": bool, "desc_act": bool,
          "static_groups": bool, "meta": dict, "checkpoint_format": str, "format": str, "pack_dtype": str, "dynamic": dict}
_UNFUSED = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}


class QqqReader(QuantisedReader):
    """A directory of QQQ weights.

    Raises:
      UserError: what `QuantisedReader` raises; bits other than 4, groups of another size than 128.
    """

    kind = "QQQ"
    _main = "B"

    def __init__(self, directory: pathlib.Path, quantisation: Mapping[str, Any], tensors: TensorFiles | None = None):
        check_entries(f"{directory} has a quantization_config that", quantisation, honoured=_KINDS, ignored=HOW_IT_WAS_MADE)
        for bits in {quantisation.get("bits"), quantisation.get("wbits")} - {None} or {None}:
            check_bits(directory, bits)
        if quantisation.get("sym") is False:
            raise UserError(f"{directory} is quantised with sym = false; QQQ's layout has symmetric weights")
        check_overrides(directory, "dynamic", quantisation.get("dynamic"), quantisation)
        self._group_size = -1 if quantisation.get("group_size") is None else quantisation["group_size"]
        if self._group_size not in _GROUP_SIZES:
            raise UserError(f"{directory} has QQQ group_size {self._group_size!r}; supported are "
                            f"{', '.join(map(str, _GROUP_SIZES))}")
        if asked_order(quantisation) and self._group_size != -1:
            raise UserError(f"{directory} is quantised with {asked_order(quantisation)}, and QQQ's layout does not say "
                            "what group each row is in; quantise with desc_act = false or static_groups = true")
        for key, expected in (("pack_dtype", "int32"), ("checkpoint_format", "qqq"), ("format", "qqq")):
            if quantisation.get(key) not in (None, expected):
                raise UserError(f"{directory} has {key} {quantisation[key]!r}; only {expected!r} is read")
        self._type = "int4 for int8, " + ("per channel" if self._group_size == -1 else f"g{self._group_size}")
        super().__init__(directory, tensors)

    def _linear_format(self) -> str:
        return "w4a8-qqq" + ("" if self._group_size == -1 else f"-g{self._group_size}")

    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        check_divisible(module, shape, 16, 64)
        rows, columns = shape
        parts = {"B": ((rows // 16, 2 * columns), ("I32",)), "s_channel": ((1, columns), ("F32",))}
        if self._group_size != -1:
            check_divisible(module, shape, self._group_size, 64)
            parts["s_group"] = ((rows // self._group_size, columns), ("F16",))
        return parts

    def _leftovers(self, module: str) -> Iterable[str]:
        if self._group_size == -1:
            yield f"{module}.s_group"
        for fused, parts in _UNFUSED.items():  # a script that fuses modules may leave their parts' empty tensors
            if module.endswith(fused):
                yield from (f"{module.removesuffix(fused)}{part}.s_group" for part in parts)

    def _read_integers(self, module: str) -> ChannelInt4 | TwoLevelInt4:
        q = layouts.qqq_codes(self._tensors.read(f"{module}.B"), grouped=self._group_size != -1)
        scales = layouts.channel_scales(self._tensors.read(f"{module}.s_channel"))
        if self._group_size == -1:
            with np.errstate(over="ignore"):  # whoever packs them looks whether they are finite
                return ChannelInt4(q, 16 * scales, 8 * (16 * scales))
        groups = layouts.group_scales(self._tensors.read(f"{module}.s_group"))
        return TwoLevelInt4(q, groups, None, scales.astype(np.float32), self._group_size)
