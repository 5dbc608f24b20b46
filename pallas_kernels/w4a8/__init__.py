from pallas_kernels.w4a8.api import expand, pack, unpack

__all__ = ["expand", "pack", "unpack"]
