from pallas_kernels.w8a16.api import matmul_partials
from pallas_kernels.w8a16.kernel import Config

__all__ = ["Config", "matmul_partials"]
