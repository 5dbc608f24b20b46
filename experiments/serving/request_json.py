"""JSON of a request's body, strictly read: UTF-8, finite numbers, each name once, and text that is text."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

_SHOWN = 80
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
"""Where a surrogate may come from: UTF-8 has none."""

Place = tuple[str | int, ...]


class JsonError(Exception):
    """What is wrong with the JSON; `place` is of the value at fault, as `spelled` gives it, None where there is none."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(message)
        self.place = place


def read(body: bytes) -> Any:
    """The value that the body holds.

    Raises:
      JsonError: the body is not UTF-8 or not JSON; a number is not finite or has too many digits; an object has a name twice;
        a text holds half of a surrogate pair; values are nested too deeply for Python.
    """
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float,
                           parse_int=_integer)
    except UnicodeDecodeError as error:
        raise JsonError(f"the body is not valid JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise JsonError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise JsonError("the body is nested too deeply") from None
    if _ESCAPED.search(text):
        _check_characters(value)
    return value


def spelled(place: Place) -> str:
    """The place of a value as clients write it, messages[0].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in place)
    return "".join(parts).removeprefix(".")


def shown(text: str) -> str:
    """A client's text as a message may hold it: on one line, not long, and of characters alone."""
    return repr(text[:_SHOWN])[1:-1] + ("..." if len(text) > _SHOWN else "")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        met: set[str] = set()
        twice = next(name for name, _ in pairs if name in met or met.add(name))
        raise JsonError(f"an object has the field {shown(twice)} twice; give it once", shown(twice))
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise JsonError(f"{shown(digits)} is too large a number")
    return value


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads some thousand digits at most
        raise JsonError(f"{shown(digits)} is too large an integer: it has {len(digits)} digits") from None


def _check_characters(value: Any) -> None:
    for place, part in _parts(value):
        if isinstance(part, str) and (found := _SURROGATE.search(part)):
            where = spelled(place)
            raise JsonError(f"{where} holds {found[0]!r}, half of a surrogate pair, which is no character", where)


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
