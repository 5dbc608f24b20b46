"""Low-bit Llama-family models decoded speculatively on JAX."""

from specmq_jax.commands import interrupts  # noqa: F401 (first, for Ctrl-C while a command is being imported)
from specmq_jax.decoding.config import DecodeConfig, TreeConfig
from specmq_jax.decoding.decode import Decoder, Generation, Logprobs, PhaseTimes
from specmq_jax.decoding.drafters import ChainDrafter, Drafter, EagleDrafter, HierarchicalDrafter, NoDrafter
from specmq_jax.decoding.engine import Engine
from specmq_jax.decoding.rounds import DecodeState
from specmq_jax.decoding.sampling import Greedy, Sampling
from specmq_jax.decoding.tickets import Ticket
from specmq_jax.decoding.tree import DraftTree
from specmq_jax.errors import NotFiniteError, UserError
from specmq_jax.loading.head import Head, load_head
from specmq_jax.loading.model import Model, load, logits, random_model
from specmq_jax.network.config import LlamaConfig, RopeConfig

__all__ = ["ChainDrafter", "DecodeConfig", "DecodeState", "Decoder", "DraftTree", "Drafter", "EagleDrafter", "Engine",
           "Generation", "Greedy", "Head", "HierarchicalDrafter", "LlamaConfig", "Logprobs", "Model", "NoDrafter",
           "NotFiniteError", "PhaseTimes", "RopeConfig", "Sampling", "Ticket", "TreeConfig", "UserError", "load", "load_head",
           "logits", "random_model"]


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: to look it up takes milliseconds
        from specmq_jax.commands.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
