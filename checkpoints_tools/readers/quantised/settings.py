"""Entries of a quantization_config: each is honoured, known to change nothing, or refused by name."""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from checkpoints_tools.readers.files.weight_files import shown
from specmq_jax.errors import UserError

Kinds = Mapping[str, type]
HOW_IT_WAS_MADE = frozenset(json.loads(
    (pathlib.Path(__file__).parents[2] / "data" / "quantization_entries.json").read_text(encoding="utf-8")))
"""Of AutoGPTQ, GPTQModel, AutoRound and transformers' GPTQConfig: how codes were chosen and by what machine, and which modules
are quantised, as the tensors tell themselves."""
OF_ACTIVATIONS = frozenset(("act_group_size", "act_sym", "act_dynamic", "act_data_type"))
"""They say nothing where activations are not quantised."""
_DEFAULTS = {"group_size": -1, "sym": True, "data_type": "int", "act_bits": 16}


def check_entries(where: str, settings: Mapping[str, Any], *, honoured: Kinds, ignored: Collection[str]) -> None:
    """Looks through the entries of an object that `where` names.

    Args:
      where: the checkpoint and the object, as a message begins.
      settings: the entries; None, false and what is empty count as absent.
      honoured: the kind that each entry must have which the reader goes by.
      ignored: entries that change nothing of what the weights mean.

    Raises:
      UserError: an entry of another kind, or one that is in neither list.
    """
    for key, value in settings.items():
        if key in honoured:
            _check_kind(where, key, value, honoured[key])
        elif key not in ignored and not _is_unset(value):
            raise UserError(f"{where} has {shown(key)} = {shown(repr(value))[:80]}, which is not read and may change what the "
                            "weights mean")


def as_object(where: str, value: Any) -> Mapping[str, Any]:
    """The value, which must be a JSON object, or null for an empty one."""
    if not isinstance(value, dict | None):
        raise UserError(f"{where} is {shown(repr(value))[:80]}; expected an object")
    return value or {}


def check_overrides(directory: pathlib.Path, key: str, overrides: Any, base: Mapping[str, Any]) -> None:
    """Refuses settings of single modules that differ from those of the others: rules of `key`, such as GPTQModel's dynamic.

    A rule without settings leaves a module out, which the tensors tell; lm_head may have settings of its own.
    """
    where = f"{directory} has a quantization_config whose {key}"
    for module, settings in as_object(where, overrides).items():
        rule = f"{where} for {shown(module)}"
        settings = as_object(rule, settings or None)
        check_entries(rule, settings, honoured={"bits": int, "group_size": int, "sym": bool, "desc_act": bool,
                                                "data_type": str, "act_bits": int},
                      ignored=HOW_IT_WAS_MADE | OF_ACTIVATIONS | {"static_groups"})
        bits = settings.get("bits")
        if bits not in (None, 4) and "lm_head" not in module:
            raise UserError(f"{directory} quantises {shown(module)} to {bits!r} bits and other weights to 4 ({key}); models of "
                            "mixed precisions are not read")
        for name, default in _DEFAULTS.items():
            expected = default if base.get(name) is None else base[name]
            if settings.get(name) not in (None, expected) and "lm_head" not in module:
                raise UserError(f"{directory} quantises {shown(module)} with {name} = {settings[name]!r} and other weights "
                                f"with {expected!r} ({key}); models of mixed precisions are not read")


def _check_kind(where: str, key: str, value: Any, kind: type) -> None:
    if value is None:
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", bool: "true or false", str: "a text", dict: "an object", list: "a list"}
        raise UserError(f"{where} has {key} = {shown(repr(value))[:80]}; expected {names[kind]}")


def _is_unset(value: Any) -> bool:
    return value is None or value is False or isinstance(value, str | list | dict) and not value
