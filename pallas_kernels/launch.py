"""The one place that launches Pallas kernels: which implementation runs, with which tuned sizes, on which backend."""

import functools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# LLVM asks llvm-symbolizer, where that is installed, for the names of functions in traces that nobody reads, often a kernel:
# W4A16's gate_up takes 4.4 s to compile so, and 0.5 s otherwise.
os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")

IMPLEMENTATIONS = ("reference", "kernel", "interpret")
_MEASURED = {"9.0": "nvidia_h200"}
"""The device whose tables serve the others of a compute capability, which have the same SMs and other memory."""


def choose(implementation: str | None) -> str:
    """The implementation to run: the one asked for, else "kernel" on a GPU and "reference" elsewhere.

    Raises ValueError for a name outside `IMPLEMENTATIONS`.
    """
    if implementation is None:
        return "kernel" if jax.default_backend() == "gpu" else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; expected None or one of {IMPLEMENTATIONS}")
    return implementation


def call(body: Callable[..., None], operands: Sequence[jax.Array], *, out_shape: Sequence[jax.ShapeDtypeStruct],
         grid: tuple[int, ...], num_warps: int, num_stages: int, interpret: bool, name: str,
         aliases: Mapping[int, int] | None = None) -> Sequence[jax.Array]:
    """Runs `body` once per grid point with whole-array references: the operands', then the outputs'.

    `aliases` maps an operand's index to the output that shares its memory. Callers are jitted functions, so that a model
    of many equal layers traces and lowers each kernel once.
    """
    # JAX 0.11 warns at every lowering, after this function has returned, so that a scoped filter would miss it.
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
    return pl.pallas_call(
        body, out_shape=tuple(out_shape), grid=grid, interpret=interpret, name=name,
        input_output_aliases=dict(aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages))(*operands)


def tuned(op: str, key: str) -> Mapping[str, int | bool] | None:
    """Measured config fields of `op` for a problem `key` on this machine's first device, or on the one measured of its compute
    capability; None where none were recorded.

    Each `api.py` spells its own keys.
    """
    own = _table(table_path(op)).get(key)
    kin = _MEASURED.get(getattr(jax.devices()[0], "compute_capability", None))
    return own if own or not kin else _table(_path(op, kin)).get(key)


def table_path(op: str) -> pathlib.Path:
    """The tuned table of `op` for this machine's first device: a JSON object from key to config fields."""
    return _path(op, re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower()).strip("_"))


def _path(op: str, device: str) -> pathlib.Path:
    return pathlib.Path(__file__).parent / op / "tuned" / f"{device}.json"


@functools.cache
def _table(path: pathlib.Path) -> Mapping[str, Mapping[str, int | bool]]:
    return json.loads(path.read_text()) if path.exists() else {}


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`; Triton's blocks have no other sizes."""
    return 1 << max(0, value - 1).bit_length()


def check_powers_of_two(config: Any, **least: int) -> None:
    """Raises ValueError for a named field of a config that is no power of two, or below its least value."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value < smallest or not is_power_of_two(value):
            raise ValueError(f"{name} is {value}; expected a power of two of at least {smallest}")


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
