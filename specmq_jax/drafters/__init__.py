"""Ways of drafting."""

from specmq_jax.drafters.chain import ChainDrafter
from specmq_jax.drafters.eagle import EagleDrafter
from specmq_jax.drafters.hierarchical import HierarchicalDrafter
from specmq_jax.drafters.plain import NoDrafter
from specmq_jax.drafters.protocol import Drafter

__all__ = ["ChainDrafter", "Drafter", "EagleDrafter", "HierarchicalDrafter", "NoDrafter"]
