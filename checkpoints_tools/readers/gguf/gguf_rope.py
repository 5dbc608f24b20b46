"""The rotation that a GGUF file of architecture llama describes, as Hugging Face's `rope_parameters`.

Rules: llama.cpp `llama-model.cpp` (load_hparams), `llama-context.cpp` and ggml's `rope_yarn`. What llama.cpp computes and no
rope type of Hugging Face does is refused. So is where the two differ: llama.cpp's converter writes Hugging Face's
betas and attention factor of yarn into keys that llama.cpp itself does not read for this architecture.
"""

import math
from typing import Any

import numpy as np

from checkpoints_tools.readers.gguf.gguf_file import Metadata
from specmq_jax import entries
from specmq_jax.errors import UserError
from specmq_jax.network.config import LlamaConfig

FACTORS = "rope_freqs.weight"
"""The tensor of divisors of the frequencies."""
_PREFIX = "llama.rope.scaling."
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
"""Of Llama 3.1 to 3.3. GGUF keeps none of it but the divisors of the frequencies that follow from it."""


def find_rope(metadata: Metadata, head_dim: int, context: int, divisors: np.ndarray | None) -> dict[str, Any]:
    """`rope_parameters` that compute the file's rotation.

    Args:
      metadata: the file's.
      head_dim: of the model; all of it is rotated.
      context: the positions that the file gives.
      divisors: the tensor `rope_freqs.weight`, None without it.

    Raises:
      UserError: a value is of the wrong kind or senseless, or no known rope type has this rotation.
    """
    theta = {"rope_theta": shortest(metadata.number("llama.rope.freq_base", 10000.0))}
    scaling = _find_scaling(metadata, context)
    if divisors is None or np.all(divisors == 1):
        return theta | scaling
    if scaling["rope_type"] != "default":
        raise UserError(f"{metadata.where} has rope scaling {scaling['rope_type']!r} beside rotary factors ({FACTORS}); no "
                        "supported rope type has both")
    return theta | _find_llama3(metadata.where, head_dim, theta["rope_theta"], divisors)


def refuse_short_yarn(where: str, llama: LlamaConfig) -> None:
    """Raises a `UserError` for a yarn whose ramp would fall: transformers lets it, llama.cpp makes a step of it."""
    if llama.rope.type == "yarn":
        low, high = llama.rope.interpolated(llama.head_dim)
        if high < low:
            raise UserError(f"{where} has rope scaling 'yarn' with an original context length of "
                            f"{llama.rope.original_max_position}, which is too short for it")


def shortest(value: float) -> float:
    """The decimal number that an f32 stands for: 1e-5 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _find_scaling(metadata: Metadata, context: int) -> dict[str, Any]:
    kind = metadata.text(f"{_PREFIX}type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{metadata.where} has {_PREFIX}type {entries.shown(kind)}, which is not supported; known: none, "
                        "linear, yarn")
    # The name of files from before there were types comes second. llama.cpp takes 0 for no factor.
    old = metadata.number("llama.rope.scale_linear", 1.0, zero=True)
    factor = shortest(metadata.number(f"{_PREFIX}factor", old, zero=True) or 1.0)
    attention = shortest(metadata.number(f"{_PREFIX}attn_factor", 1.0))
    if kind == "yarn":
        return _find_yarn(metadata, context, factor, attention)
    if attention != 1:
        raise UserError(f"{metadata.where} sets {_PREFIX}attn_factor = {attention}; it is supported with rope scaling 'yarn'")
    if kind == "none" or factor == 1:
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor}


def _find_yarn(metadata: Metadata, context: int, factor: float, attention: float) -> dict[str, Any]:
    usual = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    neutral = {"yarn_log_multiplier": (0.0,), "yarn_ext_factor": (1.0, -1.0), "yarn_attn_factor": (usual,),
               "yarn_beta_fast": (32.0,), "yarn_beta_slow": (1.0,)}
    for name, values in neutral.items():
        found = metadata.value(f"{_PREFIX}{name}")
        if isinstance(found, bool) or not isinstance(found, int | float | None):
            raise UserError(f"{metadata.where} needs a number '{_PREFIX}{name}'; found {entries.shown(found)}")
        if found is not None and not any(math.isclose(found, value, rel_tol=1e-6) for value in values):
            raise UserError(f"{metadata.where} sets {_PREFIX}{name} = {found:g}; only {values[0]:g} is supported, by which "
                            "Hugging Face and llama.cpp agree")
    original = metadata.integer(f"{_PREFIX}original_context_length", context, low=0) or context
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return found if attention == 1 else found | {"attention_factor": usual * attention}


def _find_llama3(where: str, head_dim: int, theta: float, divisors: np.ndarray) -> dict[str, Any]:
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise UserError(f"{where} has rotary factors ({FACTORS}) that are no positive numbers")
    scaling = _LLAMA3 | {"factor": shortest(divisors.max())}
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * plain / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(f"{where} has rotary factors ({FACTORS}) other than Llama 3's; this scaling is not supported")
    return scaling
