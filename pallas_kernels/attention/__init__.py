from pallas_kernels.attention.api import causal_attention, pack_mask, tree_attention
from pallas_kernels.attention.kernel import Config

__all__ = ["Config", "causal_attention", "pack_mask", "tree_attention"]
