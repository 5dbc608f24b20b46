"""Checks of single values that a user's file or call gives; what is wrong is one line that names the entry."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specmq_jax.errors import UserError

LARGEST = 2**31 - 1
"""Sizes, positions and token ids are i32 on the device."""


def shown(value: Any) -> str:
    """A value as a message quotes it: one line of at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes out no integer of more than 4300 digits
        return f"a value of type {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def is_integer(value: Any) -> bool:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def integer(where: str, key: str, value: Any, *, low: int = 1, high: int = LARGEST) -> int:
    """`value`, if it is an integer from `low` to `high`.

    Raises:
      UserError: it is not; the message says what `where` needs for `key`.
    """
    if is_integer(value) and low <= value <= high:
        return int(value)
    if is_integer(value) and value > high:
        limit = f" of at most {high}"
    else:
        limit = f" of at least {low}" if low > 1 or (low < 0 and is_integer(value)) else ""
    sign = {0: "a non-negative", 1: "a positive"}.get(low, "an")
    raise UserError(f"{where} needs {sign} integer {key!r}{limit}; found {shown(value)}")


def number(where: str, key: str, value: Any, *, zero: bool = False) -> float:
    """`value` as a float, if it is a positive number that f32 holds; `zero` allows 0 as well.

    Raises:
      UserError: it is not; the message says what `where` needs for `key`.
    """
    if (is_integer(value) or isinstance(value, float | np.floating)) and abs(value) <= float(np.finfo(np.float32).max):
        found = float(value)
        if math.isfinite(found) and (np.float32(found) > 0 or (zero and found == 0)):
            return found
    raise UserError(f"{where} needs a {'non-negative' if zero else 'positive'} number {key!r}; found {shown(value)}")


def flag(where: str, key: str, value: Any) -> bool:
    """`value`, if it is true or false.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{where} needs true or false for {key!r}; found {shown(value)}")
    return bool(value)


def integers(where: str, key: str, value: Any, *, low: int = 0) -> tuple[int, ...]:
    """`value` as a tuple, if it is a list or tuple of integers from `low` to `LARGEST`.

    Raises:
      UserError: it is not; the message quotes the entry that is wrong.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{where} needs a list of integers {key!r}; found {shown(value)}")
    return tuple(integer(where, key, item, low=low) for item in value)
