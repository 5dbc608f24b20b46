"""Ways of drafting."""

from specmq_jax.decoding.drafters.chain import ChainDrafter
from specmq_jax.decoding.drafters.eagle import EagleDrafter
from specmq_jax.decoding.drafters.hierarchical import HierarchicalDrafter
from specmq_jax.decoding.drafters.plain import NoDrafter
from specmq_jax.decoding.drafters.protocol import Drafter

__all__ = ["ChainDrafter", "Drafter", "EagleDrafter", "HierarchicalDrafter", "NoDrafter"]
