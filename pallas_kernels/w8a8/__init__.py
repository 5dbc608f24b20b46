from pallas_kernels.w8a8.api import matmul_partials, quantise_rows
from pallas_kernels.w8a8.kernel import Config

__all__ = ["Config", "matmul_partials", "quantise_rows"]
