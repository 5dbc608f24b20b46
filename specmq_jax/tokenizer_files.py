"""The files of a tokenizer, and what those beside tokenizer.json say: the names of special tokens, and the chat template."""

import pathlib
from collections.abc import Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
                   "generation_config.json")
"""Names of what goes with a checkpoint's tokenizer; generation_config.json says where answers end."""
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_DEFAULT = "default"

Templates = str | dict[str, str]
"""A chat template, or several by their names."""


def special_tokens(directory: pathlib.Path) -> dict[str, str]:
    """The text of each special token that tokenizer_config.json or, from older versions, special_tokens_map.json names.

    Raises:
      UserError: an entry is neither text nor a token's description.
    """
    config = directory / "tokenizer_config.json"
    found = _named(config)
    if "added_tokens_decoder" not in _read(config):  # with it, transformers reads no map
        found |= _named(directory / "special_tokens_map.json")
    return found


def chat_template(directory: pathlib.Path) -> Templates | None:
    """The directory's chat template; None without one.

    As in transformers, chat_template.jinja and additional_chat_templates/NAME.jinja go before the entry of
    tokenizer_config.json. chat_template.json, which processors of older versions wrote, comes last.

    Raises:
      UserError: a template is no text.
    """
    files = {_DEFAULT: directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = found or _entry(directory / name)
    return found[_DEFAULT] if found.keys() == {_DEFAULT} else found or None


def _named(path: pathlib.Path) -> dict[str, str]:
    found = {}
    for name, value in _read(path).items():
        if name not in _NAMED or value is None:
            continue
        text = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:  # half of a surrogate pair is no text
            raise UserError(f"{path}: {name} must be a token's text or an object with its content; found {value!r:.80}")
        found[name] = text
    return found


def _entry(path: pathlib.Path) -> dict[str, str]:
    """The entry chat_template: text, templates by name, or a list of objects of a name and a template."""
    value = _read(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("name"), str) for part in value):
        value = {part["name"]: part.get("template") for part in value}
    named = value if isinstance(value, dict) else {_DEFAULT: value}
    if not all(isinstance(template, str) for template in named.values()):
        raise UserError(f"{path}: chat_template must be text, or objects of a name and a template, both text; found "
                        f"{value!r:.80}")
    return named


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
