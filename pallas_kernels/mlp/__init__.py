from pallas_kernels.mlp.api import silu_mul

__all__ = ["silu_mul"]
