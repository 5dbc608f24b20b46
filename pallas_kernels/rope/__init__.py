from pallas_kernels.rope.api import rope_append
from pallas_kernels.rope.kernel import Config

__all__ = ["Config", "rope_append"]
