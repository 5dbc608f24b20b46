"""Entries of a head's config.json that say how it computes, beside the sizes that any Llama has.

They come from the forks that write heads in the official layout: SpecForge, SGLang, vLLM and NVIDIA's ModelOpt.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from specmq_jax.entries import shown
from specmq_jax.errors import UserError
from specmq_jax.loading.head_file import Headers
from specmq_jax.loading.head_tensors import ROTATION
from specmq_jax.network.eagle import ROTATED_TARGET

_LAYERS = "eagle_aux_hidden_state_layer_ids"
_OTHER_LAYERS = {"aux_hidden_state_layer_ids": 0, "target_layer_ids": 1, "layer_ids": 0, "eagle_layer_ids": 0,
                 "aux_layer_ids": 0}
"""Names that other kinds of heads give the layers they read, and what turns an id into the stream that enters a layer."""
_PLAIN: Mapping[str, Any] = {
    "fc_norm": False, "norm_before_fc": False, "norm_output": False, "norm_before_residual": False, "qkv_bias": False,
    "use_qk_norm": False, "qk_norm": False, "parallel_drafting": False, "use_mtp_layernorm": False,
    "eh_proj_before_attn": False, "return_hidden_post_norm": False, "parallel_draft_step": 1, "logit_scale": 1}
"""Entries with the value that says nothing but what the official network is."""
_BY_VERSION: Mapping[str, Mapping[int, Any]] = {
    "use_aux_hidden_state": {2: False, 3: True}, "use_input_layernorm_in_first_layer": {2: False, 3: True},
    "use_last_layernorm": {2: False, 3: True}}


def check_entries(directory: pathlib.Path, settings: Mapping[str, Any], headers: Headers, version: int) -> None:
    """An entry that asks for another network than the official one is a `UserError` that names it.

    Args:
      directory: named in the message.
      settings: all of config.json.
      headers: of the head's tensors.
      version: 2 or 3.
    """
    plain = {**_PLAIN, **{key: values[version] for key, values in _BY_VERSION.items()}}
    if version == 3:
        plain["bias"] = False
    plain |= {f"has_own_{name}": f"{name}.weight" in headers for name in ("embed_tokens", "lm_head")}
    _refuse(directory, "", settings, plain)
    nested = settings.get("eagle_config")
    if nested is not None:
        if not isinstance(nested, dict):
            raise UserError(f"{directory}: config.json has eagle_config = {shown(nested)}; expected an object")
        _refuse(directory, "eagle_config.", nested, plain)
        for key in nested.keys() - plain.keys() - {_LAYERS}:
            raise UserError(f"{directory}: config.json has the entry eagle_config.{key}, which is not known; remove it if it "
                            "changes nothing")
    if not isinstance(settings.get("bias", True), bool):
        raise UserError(f"{directory}: config.json has bias = {shown(settings['bias'])}; expected true or false")
    _check_rotation(directory, settings, headers, version)


def check_widths(directory: pathlib.Path, settings: Mapping[str, Any], target_hidden_size: int) -> None:
    """The width of the head's layers is a number, and that of its target, where config.json gives it, this target's."""
    hidden, wanted = settings.get("hidden_size", 1), settings.get("target_hidden_size")
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise UserError(f"{directory}: config.json has hidden_size = {shown(hidden)}; expected a positive integer")
    if wanted is not None and (isinstance(wanted, bool) or wanted != target_hidden_size):
        raise UserError(f"{directory}: config.json has target_hidden_size = {shown(wanted)}; this target's states are "
                        f"{target_hidden_size} wide")


def named_streams(directory: pathlib.Path, settings: Mapping[str, Any], version: int) -> tuple[int, ...]:
    """Target layers whose entering streams config.json says the head reads; empty where it says nothing.

    Stream i enters layer i and leaves layer i - 1. The entry `eagle_aux_hidden_state_layer_ids` counts entering streams, as
    vLLM reads it; inside `eagle_config` it counts leaving ones, as SpecForge, SGLang and ModelOpt write it.

    Raises:
      UserError: no ascending list of whole numbers, two lists that differ, or one in an EAGLE-2 head, which reads none.
    """
    nested = settings.get("eagle_config")
    entries = [(_LAYERS, settings.get(_LAYERS), 0)]
    if isinstance(nested, dict):
        entries.append((f"eagle_config.{_LAYERS}", nested.get(_LAYERS), 1))
    found = {name: _streams(directory, name, ids, shift) for name, ids, shift in entries if ids not in (None, [])}
    if found and version == 2:
        raise UserError(f"{directory}: config.json has {next(iter(found))}; an EAGLE-2 head reads its target's final states")
    if len(set(found.values())) > 1:
        raise UserError(f"{directory}: config.json names two lists of layers, {' and '.join(found)}, which stand for the "
                        f"streams entering layers {' and '.join(str(list(ids)) for ids in found.values())}; remove one")
    return next(iter(found.values()), ())


def check_other_streams(directory: pathlib.Path, settings: Mapping[str, Any], capture: tuple[int, ...]) -> None:
    """Lists of layers under the names that other kinds of heads use are those that the head reads."""
    for name, shift in _OTHER_LAYERS.items():
        ids = settings.get(name)
        if ids not in (None, []) and (streams := _streams(directory, name, ids, shift)) != capture:
            raise UserError(f"{directory}: config.json has {name} = {ids}, the streams entering layers {list(streams)}; this "
                            f"head reads {list(capture)}; an EAGLE-3 head names its layers in {_LAYERS}")


def _streams(directory: pathlib.Path, name: str, ids: Any, shift: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids) or ids != sorted(set(ids)):
        raise UserError(f"{directory}: config.json has {name} = {shown(ids)}; expected an ascending list of layers")
    return tuple(i + shift for i in ids)


def _refuse(directory: pathlib.Path, place: str, settings: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    for key, value in plain.items():
        found = settings.get(key)
        if found is not None and (found != value or isinstance(found, bool) != isinstance(value, bool)):
            raise UserError(f"{directory}: config.json has {place}{key} = {shown(found)}, and only {str(value).lower()} is "
                            "supported for a head of its kind")


def _check_rotation(directory: pathlib.Path, settings: Mapping[str, Any], headers: Headers, version: int) -> None:
    found, rotated = settings.get(ROTATED_TARGET), ROTATION in headers
    if not isinstance(found, bool | None):
        raise UserError(f"{directory}: config.json has {ROTATED_TARGET} = {shown(found)}; expected true or false")
    if found is False and rotated or found and not rotated and version == 2:
        raise UserError(f"{directory}: config.json has {ROTATED_TARGET} = {str(found).lower()}, and tensor "
                        f"{ROTATION} is {'there' if rotated else 'missing'}")
