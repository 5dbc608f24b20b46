"""What a model's parameters are: their paths, shapes and formats, apart from any array or file."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import numpy as np

from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.formats import DenseFormat, Weight, WeightFormat
from specmq_jax.network.config import LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """The formats of a model's parts: `linear` of the layers' weights, `head` of lm_head, `embed` of the table."""

    linear: WeightFormat
    head: WeightFormat
    embed: DenseFormat

    @classmethod
    def named(cls, names: Mapping[str, str]) -> Self:
        """The formats of {"linear": name, "head": name, "embed": name}."""
        embed = formats.get(names["embed"])
        if not isinstance(embed, DenseFormat):
            raise UserError(f"the embedding table can't be stored as {embed.name}; it must be dense")
        return cls(linear=formats.get(names["linear"]), head=formats.get(names["head"]), embed=embed)

    @property
    def names(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name).name for field in dataclasses.fields(self)}

    def abstract(self, path: str, shape: tuple[int, ...]) -> Weight:
        """What is stored at a path of `parameter_shapes`, with `jax.ShapeDtypeStruct` leaves."""
        if path == "embed/table":
            return jax.ShapeDtypeStruct(shape, self.embed.dtype)
        if path.endswith("/scale"):
            return jax.ShapeDtypeStruct(shape, np.float32)
        rows, columns = shape
        return self.of(path).abstract((rows, columns))

    def of(self, path: str) -> WeightFormat:
        """The format of the linear weight at a path."""
        return self.head if path == "lm_head/w" else self.linear


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Logical shapes by path in the order of the forward pass: [in, out] of linear weights, [V, D] of the table."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed/table": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {
            f"layers_{i}/attention_norm/scale": (hidden,),
            f"layers_{i}/attention/qkv/w": (hidden, config.qkv_features),
            f"layers_{i}/attention/o/w": (heads, hidden),
            f"layers_{i}/mlp_norm/scale": (hidden,),
            f"layers_{i}/mlp/gate_up/w": (hidden, 2 * config.intermediate_size),
            f"layers_{i}/mlp/down/w": (config.intermediate_size, hidden),
        }
    shapes["norm/scale"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head/w"] = (hidden, config.vocab_size)
    return shapes
