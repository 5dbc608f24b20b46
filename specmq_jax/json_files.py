"""JSON that came from elsewhere: whatever is wrong with it is one line that names what holds it."""

import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from specmq_jax.errors import UserError

_SHOWN = 80
_SURROGATE = re.compile("[\ud800-\udfff]")

Place = tuple[str | int, ...]


class JsonError(UserError):
    """What is wrong with a JSON text; `place` is of the value at fault, as `spelled` gives it, None where there is none."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Parses a JSON object from a file of UTF-8; a missing, unreadable or malformed file is a one-line `UserError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    value = parse_json(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; found a {type(value).__name__}")
    return value


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text; `name` is what a message calls it.

    JSON as RFC 8259 has it: NaN, Infinity and a number beyond float64 are refused. So is what it leaves open and a reader
    would settle silently: an entry given twice with different values, and half of a surrogate pair.

    Raises:
      JsonError: a text that is not such JSON, is nested too deeply, or holds an integer of thousands of digits.
    """
    if text.startswith("\ufeff"):
        raise JsonError(f"{name} is not valid JSON: it begins with a byte order mark; save it as plain UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_entries, parse_constant=_refuse_constant, parse_float=_finite,
                           parse_int=_integer)
        if "\\ud" in text.lower():
            _check_characters(value)
    except RecursionError:
        raise JsonError(f"{name} is not valid JSON: it is nested too deeply") from None
    except (JsonError, ValueError) as error:
        raise JsonError(f"{name} is not valid JSON: {error}", getattr(error, "place", None)) from None
    return value


def spelled(place: Place) -> str:
    """The place of a value as clients write it, messages[0].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in place)
    return "".join(parts).removeprefix(".")


def shown(text: str) -> str:
    """A text of the user's as a message may hold it: on one line, not long, and of characters alone."""
    return repr(text[:_SHOWN])[1:-1] + ("..." if len(text) > _SHOWN else "")


def _entries(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise JsonError(f"the entry '{shown(key)}' is given twice, with different values", shown(key))
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is too large a number")
    return value


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads some thousand digits at most, and its own words go on about its settings
        raise ValueError(f"{shown(digits)} is too large an integer: it has {len(digits.lstrip('-'))} digits") from None


def _check_characters(value: Any) -> None:
    for place, part in _parts(value):
        if isinstance(part, str) and (found := _SURROGATE.search(part)):
            where = spelled(place)
            raise JsonError(f"{where or 'it'} holds {found[0]!r}, half of a surrogate pair, which is no character", where)


def _parts(value: Any) -> Iterator[tuple[Place, Any]]:
    """Each value and each name of an object, with its place."""
    waiting: list[tuple[Place, Any]] = [((), value)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        if isinstance(part, dict):
            yield from (((*place, name), name) for name in part)
            waiting += [((*place, name), entry) for name, entry in part.items()]
        elif isinstance(part, list):
            waiting += [((*place, number), entry) for number, entry in enumerate(part)]


def is_json(line: bytes) -> bool:
    """Whether it is JSON as a whole."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
