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
        if is_vector(path):
            return jax.ShapeDtypeStruct(shape, np.float32)
        rows, columns = shape
        return self.of(path).abstract((rows, columns))

    def of(self, path: str) -> WeightFormat:
        """The format of the linear weight at a path."""
        return self.head if path == "lm_head/w" else self.linear


def is_vector(path: str) -> bool:
    """Whether a path of `parameter_shapes` is that of a norm's weight or of a bias, which are held in f32."""
    return path.endswith(("/scale", "/bias"))


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Logical shapes by path in the order of the forward pass: [in, out] of linear weights, [V, D] of the table."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed/table": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {f"layers_{i}/{path}": shape for path, shape in _layer_shapes(config).items()}
    shapes |= _norm_shapes(config, "norm")
    if not config.tie_embeddings:
        shapes["lm_head/w"] = (hidden, config.vocab_size)
    return shapes


def _layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    before, behind = config.block != "post", config.block in ("post", "both")
    shapes = _norm_shapes(config, "attention_norm") if before else {}
    shapes |= _linear_shapes("attention/qkv", (hidden, config.qkv_features), has_bias="qkv" in config.biases)
    if config.qk_norm:
        for name, count in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
            width = config.head_dim if config.qk_norm == "head" else count * config.head_dim
            shapes[f"attention/{name}/scale"] = (width,)
    shapes |= _linear_shapes("attention/o", (heads, hidden), has_bias="o" in config.biases)
    shapes |= _norm_shapes(config, "attention_post_norm") if behind else {}
    shapes |= _norm_shapes(config, "mlp_norm") if config.block in ("pre", "both") else {}
    has_bias = "mlp" in config.biases
    shapes |= (_linear_shapes("mlp/up", (hidden, inner), has_bias=has_bias) if config.mlp == "plain-gelu" else
               _linear_shapes("mlp/gate_up", (hidden, 2 * inner), has_bias=has_bias))
    shapes |= _linear_shapes("mlp/down", (inner, hidden), has_bias=has_bias)
    return shapes | (_norm_shapes(config, "mlp_post_norm") if behind else {})


def _linear_shapes(path: str, shape: tuple[int, int], *, has_bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{path}/w": shape, **({f"{path}/bias": shape[1:]} if has_bias else {})}


def _norm_shapes(config: LlamaConfig, path: str) -> dict[str, tuple[int, ...]]:
    shape = (config.hidden_size,)
    return {f"{path}/scale": shape, **({f"{path}/bias": shape} if "norm" in config.biases else {})}
