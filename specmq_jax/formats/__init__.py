"""Weight formats by name: the only place that knows precisions."""

from specmq_jax.errors import UserError
from specmq_jax.formats.base import GroupedInt4, Logical, Weight, WeightFormat, dense_values
from specmq_jax.formats.dense import Dense, DenseFormat
from specmq_jax.formats.int4 import Int4Group, Int4GroupFormat

__all__ = ["Dense", "DenseFormat", "GroupedInt4", "Int4Group", "Int4GroupFormat", "Logical", "Weight", "WeightFormat",
           "dense_values", "get", "names"]

_FORMATS: tuple[WeightFormat, ...] = (
    *(DenseFormat(kind=kind) for kind in ("fp32", "bf16", "fp16")),
    *(Int4GroupFormat(group_size=size) for size in (128, 64, 32, -1)),
)
_ALIASES = {"w4a16-g128": "w4a16", "w4a16-g-1": "w4a16-channel", "float32": "fp32", "bfloat16": "bf16",
            "float16": "fp16"}


def names() -> list[str]:
    """The names that `get` knows, without aliases."""
    return [weight_format.name for weight_format in _FORMATS]


def get(name: str) -> WeightFormat:
    """The format of that name; an unknown name is a `UserError` that lists the known ones."""
    wanted = _ALIASES.get(name, name)
    for weight_format in _FORMATS:
        if weight_format.name == wanted:
            return weight_format
    raise UserError(f"precision {name!r} is not known; choose one of {', '.join(names())}")
