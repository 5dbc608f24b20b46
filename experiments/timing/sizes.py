"""Sizes of models that are timed with random weights."""

import pathlib
from collections.abc import Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.network.config import LlamaConfig, RopeConfig


def _llama3(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=128256, num_kv_heads=8, max_position=131072, rope=RopeConfig(theta=500000.0), **sizes)


SHAPES: Mapping[str, LlamaConfig] = {
    "llama3-8b": _llama3(hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, head_dim=128),
    "llama3-70b": _llama3(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, head_dim=128),
    "llama3-1b": _llama3(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, head_dim=64,
                         tie_embeddings=True),
    "demo": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
                        head_dim=64, max_position=8192, rope=RopeConfig(theta=100000.0), tie_embeddings=True),
    "tiny": LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=16, max_position=2048),  # for tests
}
_SMALL = {"llama3-70b": "llama3-8b", "llama3-8b": "llama3-1b"}


def shape(name: str) -> LlamaConfig:
    """Sizes of a model: one of `SHAPES`, or those of a directory's config.json.

    Raises:
      UserError: neither of the two, or a config.json that can't be read.
    """
    if name in SHAPES:
        return SHAPES[name]
    if not pathlib.Path(name).is_dir():
        raise UserError(f"shape {name!r} is neither one of {', '.join(SHAPES)} nor a directory with a config.json")
    return LlamaConfig.from_directory(name)


def small_shape(name: str) -> str:
    """What drafts for a target of a shape where nothing else is asked for: the next smaller model, else one of its size."""
    return _SMALL.get(name, name)
