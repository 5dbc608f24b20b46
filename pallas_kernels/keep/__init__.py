from pallas_kernels.keep.api import keep_path
from pallas_kernels.keep.kernel import Config

__all__ = ["Config", "keep_path"]
