from pallas_kernels.mlp.api import silu_mul, silu_mul_peaks

__all__ = ["silu_mul", "silu_mul_peaks"]
