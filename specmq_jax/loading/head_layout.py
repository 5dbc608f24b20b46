"""Which layout a draft head is stored in; only the official one of EAGLE (SafeAILab/EAGLE) is read."""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.loading.head_file import Headers
from specmq_jax.loading.head_tensors import EMBED, FC, LM_HEAD

_PREFIXES = ("model.", "module.", "draft_model.", "eagle_module.", "_orig_mod.")
_MEDUSA = re.compile(r"(medusa_head\.)?\d+\.\d+\.(linear\.)?(weight|bias)$")
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|s_channel|s_group|B|weight_packed|weight_scale|weight_scale_inv|absmax)$")
_MTP = re.compile(r"(^|\.)(mtp|eh_proj|enorm|hnorm)\.")
_MLA = re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa|kv_b_proj)\.")


def check_layout(directory: pathlib.Path, settings: Mapping[str, Any], headers: Headers) -> None:
    """A head of another kind or layout than the official one is a `UserError` that says which.

    Args:
      directory: named in the message.
      settings: all of config.json.
      headers: of all tensors.
    """
    for found in _other_layouts(settings, headers):
        raise UserError(f"{directory} holds {found}; only EAGLE-1, -2 and -3 heads in the official layout (SafeAILab/EAGLE) "
                        "are read")
    if FC not in headers:
        raise UserError(f"{directory} holds no EAGLE head: tensor fc.weight is missing")
    for name in (FC, EMBED, LM_HEAD):
        if name in headers and len(headers[name].shape) != 2:
            raise UserError(f"{directory}: tensor {name} has shape {list(headers[name].shape)}; expected a matrix")


def _other_layouts(settings: Mapping[str, Any], headers: Headers) -> Iterator[str]:
    """In words, what other layouts the entries of config.json and the names of tensors are signs of."""
    names = settings.get("architectures")
    architectures = " ".join(map(str, names)) if isinstance(names, list) else str(names)

    def entry(*keys: str) -> str | None:
        return next((key for key in keys if settings.get(key) is not None), None)

    def tensor(pattern: re.Pattern[str]) -> str | None:
        return next((name for name in headers if pattern.search(name)), None)

    if key := entry("transformer_layer_config", "speculators_model_type", "speculators_config"):
        kind = settings.get("speculators_model_type")
        yield f"a head in the layout of vLLM's speculators (config.json has {key}{f', of kind {kind}' if kind else ''})"
    if entry("dflash_config") or "DFlash" in architectures or "DSpark" in architectures:
        options = settings.get("dflash_config")
        causal = isinstance(options, dict) and options.get("causal_head")
        yield f"a {'JetSpec' if causal else 'DSpark' if 'DSpark' in architectures else 'DFlash'} head"
    if "mask_hidden" in headers or "PEagle" in architectures:
        yield "a P-EAGLE head (tensor mask_hidden)"
    if entry("medusa_num_heads", "medusa_num_layers") or "Medusa" in architectures or tensor(_MEDUSA):
        yield "Medusa heads"
    if entry("hydra_num_heads", "hydra_num_layers"):
        yield "Hydra heads"
    if settings.get("model_type") == "mlp_speculator" or "MLPSpeculator" in architectures:
        yield "an MLP speculator"
    if name := tensor(_MTP):
        yield f"a head for multi-token prediction (MTP; tensor {name})"
    if entry("q_lora_rank", "kv_lora_rank") or "DeepseekV" in architectures or tensor(_MLA):
        yield "a head with multi-head latent attention (MLA)"
    if key := entry("quantization_config", "compression_config"):
        yield f"a quantised head (config.json has {key})"
    if name := tensor(_QUANTISED):
        yield f"a quantised head (tensor {name})"
    if isinstance(settings.get("model"), dict):
        yield "a head in the layout of vLLM's EAGLE configurations (config.json has its sizes in model)"
    if "layers.0.hidden_norm.weight" in headers:
        yield "an EAGLE-3 head in the layout of vLLM's speculators (its layer is named layers.0., officially midlayer.)"
    for prefix in _PREFIXES:
        if any(f"{prefix}{name}" in headers for name in (FC, "midlayer.hidden_norm.weight")):
            yield f"a head in a layout whose tensors' names begin with {prefix}"
