"""Compiles for an H200 that need not be there, with XLA's own Triton, where JAX's CUDA plugin is installed."""

import functools
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
_FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{")
_BRANCH = re.compile(r"(?:@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L\w+)")


@functools.cache
def _device() -> Any:
    return topologies.get_topology_desc("", "cuda", target_config=_H200, topology="1x1x1").devices[0]


def ptx_of(function: Callable, *avals: jax.ShapeDtypeStruct) -> list[str]:
    """The PTX of each kernel that `function` is compiled to."""
    sharding = jax.sharding.SingleDeviceSharding(_device())
    placed = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in avals]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function, out_shardings=sharding).trace(*placed).lower()
    with tempfile.TemporaryDirectory() as place:
        lowered.compile(compiler_options={"xla_dump_to": place, "xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": ".*"})
        return [file.read_text() for file in sorted(pathlib.Path(place).glob("*.ptx"))]


def left_in_flight(ptx: str) -> int:
    """Loops at whose end a warpgroup's product that reads registers has not been waited for.

    The next turn may write these registers: ptxas before 13.5 doesn't keep them.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith("$L")}
    found = 0
    for end, line in enumerate(lines):
        branch = _BRANCH.match(line)
        if not branch or labels.get(branch[1], end) >= end:
            continue
        groups, is_open = [], False
        for inside in lines[labels[branch[1]]:end]:
            is_open |= bool(_FROM_REGISTERS.search(inside))
            if "wgmma.commit_group" in inside:
                groups.append(is_open)
                is_open = False
            if wait := re.search(r"wgmma\.wait_group\S*\s+(\d+)", inside):
                groups = groups[len(groups) - int(wait[1]):] if int(wait[1]) else []
        found += any(groups) or is_open
    return found
