from pallas_kernels.norm.api import add_rms_norm
from pallas_kernels.norm.kernel import Config

__all__ = ["Config", "add_rms_norm"]
