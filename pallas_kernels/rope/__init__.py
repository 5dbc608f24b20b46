from pallas_kernels.rope.api import rope_append, rotated
from pallas_kernels.rope.kernel import Config

__all__ = ["Config", "rope_append", "rotated"]
