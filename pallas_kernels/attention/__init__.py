from pallas_kernels.attention.api import causal_attention, ordered_attention, pack_mask, tree_attention, tree_paths
from pallas_kernels.attention.kernel import Config

__all__ = ["Config", "causal_attention", "ordered_attention", "pack_mask", "tree_attention", "tree_paths"]
