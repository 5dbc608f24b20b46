from pallas_kernels.nucleus.api import least_kept
from pallas_kernels.nucleus.kernel import Config

__all__ = ["Config", "least_kept"]
