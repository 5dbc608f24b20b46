from pallas_kernels.dense.api import matmul_partials
from pallas_kernels.dense.kernel import MOST_ROWS, Config

__all__ = ["MOST_ROWS", "Config", "matmul_partials"]
