"""Low-bit Llama-family models decoded speculatively on JAX."""

from specmq_jax import interrupts  # noqa: F401 (first, for Ctrl-C while a command is being imported)
from specmq_jax.config import DecodeConfig, LlamaConfig, RopeConfig, TreeConfig
from specmq_jax.decode import Decoder, DecodeState, Generation, PhaseTimes
from specmq_jax.drafters import ChainDrafter, Drafter, EagleDrafter, HierarchicalDrafter, NoDrafter
from specmq_jax.errors import NotFiniteError, UserError
from specmq_jax.head import Head, load_head
from specmq_jax.model import Model, load, logits, random_model
from specmq_jax.sampling import Greedy, Sampling
from specmq_jax.tree import DraftTree

__all__ = ["ChainDrafter", "DecodeConfig", "DecodeState", "Decoder", "DraftTree", "Drafter", "EagleDrafter", "Generation",
           "Greedy", "Head", "HierarchicalDrafter", "LlamaConfig", "Model", "NoDrafter", "NotFiniteError", "PhaseTimes",
           "RopeConfig", "Sampling", "TreeConfig", "UserError", "load", "load_head", "logits", "random_model"]


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: to look it up takes milliseconds
        from specmq_jax.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
