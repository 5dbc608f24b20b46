"""JSON that came from elsewhere: whatever is wrong with it is one line that names the file."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from specmq_jax.errors import UserError


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
      UserError: a text that is not such JSON, is nested too deeply, or holds an integer of thousands of digits.
    """
    if text.startswith("\ufeff"):
        raise UserError(f"{name} is not valid JSON: it begins with a byte order mark; save it as plain UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=_entries, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{name} is not valid JSON: it is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{name} is not valid JSON: it holds \\u{ord(half):04x}, half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from None
    except ValueError as error:
        # Python's own words for an integer beyond its limit of digits go on about its settings.
        reason = "an integer has too many digits" if "integer string conversion" in str(error) else error
        raise UserError(f"{name} is not valid JSON: {reason}") from None
    return value


def _entries(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the entry {key!r} is given twice, with different values")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def is_json(line: bytes) -> bool:
    """Whether it is JSON as a whole."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
