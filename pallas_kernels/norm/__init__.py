from pallas_kernels.norm.api import add_rms_norm, add_rms_norm_deferred
from pallas_kernels.norm.kernel import Config
from pallas_kernels.norm.row_scale import RowScale

__all__ = ["Config", "RowScale", "add_rms_norm", "add_rms_norm_deferred"]
