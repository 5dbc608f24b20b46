from pallas_kernels.w8a8.api import matmul, quantise_rows

__all__ = ["matmul", "quantise_rows"]
