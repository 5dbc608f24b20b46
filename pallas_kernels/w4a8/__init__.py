from pallas_kernels.w4a8.api import channel_partials, group_partials
from pallas_kernels.w4a8.kernel import Config
from pallas_kernels.w4a8.layout import BLOCK, pack, pack_groups, packed_shape, unpack, unpack_groups
from pallas_kernels.w4a8.reference import expand, saturates

__all__ = ["BLOCK", "Config", "channel_partials", "expand", "group_partials", "pack", "pack_groups", "packed_shape",
           "saturates", "unpack", "unpack_groups"]
