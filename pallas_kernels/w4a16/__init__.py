from pallas_kernels.w4a16.api import matmul, matmul_partials, pack, packed_shape, unpack
from pallas_kernels.w4a16.kernel import Config

__all__ = ["Config", "matmul", "matmul_partials", "pack", "packed_shape", "unpack"]
