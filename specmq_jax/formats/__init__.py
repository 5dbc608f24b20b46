"""Weight formats by name: the only place that knows precisions."""

import jax.numpy as jnp

from specmq_jax.errors import UserError
from specmq_jax.formats.base import MOST_REPRODUCIBLE_ROWS, Weight, WeightFormat
from specmq_jax.formats.dense import Dense, DenseFormat
from specmq_jax.formats.expanded import expand, expanded
from specmq_jax.formats.int4 import Int4Group, Int4GroupFormat
from specmq_jax.formats.int8 import Int8Channel, Int8ChannelFormat
from specmq_jax.formats.logical import (
    AnyArray,
    ChannelInt4,
    ChannelInt8,
    GroupedInt4,
    Logical,
    Quantised,
    TwoLevelInt4,
    dense_values,
)
from specmq_jax.formats.ranges import Range, largest, peak
from specmq_jax.formats.w4a8 import Int4Channel, Int4Int8Format, Int4TwoLevel

__all__ = ["MOST_REPRODUCIBLE_ROWS", "AnyArray", "ChannelInt4", "ChannelInt8", "Dense", "DenseFormat", "GroupedInt4",
           "Int4Channel", "Int4Group", "Int4GroupFormat", "Int4Int8Format", "Int4TwoLevel", "Int8Channel", "Int8ChannelFormat",
           "Logical", "Quantised", "Range", "TwoLevelInt4", "Weight", "WeightFormat", "dense_format", "dense_values",
           "expand", "expanded", "get", "largest", "names", "peak"]

_FORMATS: tuple[WeightFormat, ...] = (
    *(DenseFormat(kind=kind) for kind in ("fp32", "bf16", "fp16")),
    *(Int4GroupFormat(group_size=size) for size in (128, 64, 32, -1)),
    *(Int8ChannelFormat(activation_bits=bits) for bits in (8, 16)),
    *(Int4Int8Format(scheme=scheme, group_size=size) for scheme in ("qqq", "qoq") for size in (-1, 128)),
)
_READ_ONLY: tuple[WeightFormat, ...] = tuple(Int4GroupFormat(group_size=size, act_order=True) for size in (128, 64, 32))
"""What toolkits' checkpoints ask for, and round-to-nearest has no use for."""
_ALIASES = {"w4a16-g128": "w4a16", "w4a16-g-1": "w4a16-channel", "float32": "fp32", "bfloat16": "bf16",
            "float16": "fp16", "w4a16-g128-act-order": "w4a16-act-order"}


def names() -> list[str]:
    """The names of precisions that a model can be rounded to, without aliases; `get` knows some more."""
    return [weight_format.name for weight_format in _FORMATS]


def get(name: str) -> WeightFormat:
    """The format of that name; an unknown name is a `UserError` that lists the known ones."""
    wanted = _ALIASES.get(name, name)
    for weight_format in (*_FORMATS, *_READ_ONLY):
        if weight_format.name == wanted:
            return weight_format
    raise UserError(f"precision {name!r} is not known; choose one of {', '.join(names())}")


def dense_format(dtype: jnp.dtype) -> DenseFormat:
    """The format of weights that are stored in an activations' dtype."""
    return next(DenseFormat(kind=kind) for kind in ("fp32", "bf16", "fp16") if DenseFormat(kind=kind).dtype == dtype)
