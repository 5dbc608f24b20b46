"""What drafters ask of the numbers and models that they are made of."""

import numbers
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.loading.model import Model
from specmq_jax.network.config import LlamaConfig


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def check_flag(name: str, value: Any) -> None:
    """Anything but True or False is a `UserError`."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be True or False; found {value!r}")


def check_model(value: Any) -> None:
    """Anything but a model is a `UserError`."""
    if not isinstance(value, Model):
        raise UserError(f"the draft model must be what specmq_jax.load returns; found a {type(value).__name__}")


def check_depth(max_depth: int, max_len: int | None) -> None:
    """A draft of more than `max_len` tokens is a `UserError`."""
    if max_len is not None and max_depth > max_len:
        raise UserError(f"a draft may have {max_depth} tokens, and max_len is {max_len}; draft fewer tokens")


def check_lengths(draft: LlamaConfig, max_depth: int, max_len: int | None) -> None:
    """A draft model that was made for fewer than `max_len` tokens, or a draft that is longer, is a `UserError`; a dynamic
    rotary embedding stretches to any length."""
    check_depth(max_depth, max_len)
    if max_len is not None and max_len > draft.max_position and draft.rope.type != "dynamic":
        raise UserError(f"the draft model was made for at most {draft.max_position} tokens (max_position_embeddings), and "
                        f"max_len is {max_len}; lower max_len or choose another draft model")


def describe_model(model: Model) -> str:
    """A model's name and precision, for a drafter's `repr`."""
    return f"{model.directory.name if model.directory else 'random weights'} at {model.precision}"
