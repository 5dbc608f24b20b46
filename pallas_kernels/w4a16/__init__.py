from pallas_kernels.w4a16.api import (
    matmul,
    matmul_partials,
    pack,
    pack_scales,
    packed_shape,
    scales_shape,
    unpack,
    unpack_scales,
)
from pallas_kernels.w4a16.kernel import Config

__all__ = ["Config", "matmul", "matmul_partials", "pack", "pack_scales", "packed_shape", "scales_shape", "unpack",
           "unpack_scales"]
