"""Words for what is printed."""

from typing import Any

import jax
import numpy as np


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number and what it counts: "1 token", "2 tokens"; `plural` is for nouns that don't just add an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def scalar(value: Any) -> str:
    """An array of few numbers for a `repr`: its values, or its type and shape where it has none, as in a jitted function, or
    no longer, as a state that was consumed."""
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "shape") or not hasattr(value, "__array__"):
        return str(getattr(value, "aval", value))
    if isinstance(value, jax.Array) and value.is_deleted():
        return f"{value.dtype}{list(value.shape)}, consumed"
    return str(np.asarray(value).tolist())
