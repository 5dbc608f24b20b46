from pallas_kernels.top_k.api import log_softmax_top_k, ranks, top_k_small
from pallas_kernels.top_k.kernel import Config

__all__ = ["Config", "log_softmax_top_k", "ranks", "top_k_small"]
