from pallas_kernels.dense.api import matmul_partials
from pallas_kernels.dense.kernel import Config

__all__ = ["Config", "matmul_partials"]
