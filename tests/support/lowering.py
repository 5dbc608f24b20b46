"""Compiles kernels down to Triton for a GPU that need not be there."""

import contextlib
from collections.abc import Callable

import jax


def cuda_text(function: Callable, *avals: jax.ShapeDtypeStruct) -> str:
    """StableHLO of `function` lowered for an NVIDIA H200; Pallas calls in it have been lowered to Triton's own IR."""
    with contextlib.ExitStack() as stack:
        # JAX 0.10 lowers for an absent GPU as it is, JAX 0.11 asks which GPU.
        if jax.__version_info__ >= (0, 11) and jax.devices()[0].platform != "gpu":
            device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
            mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        return jax.jit(function).trace(*avals).lower(lowering_platforms=("cuda",)).as_text()


def launches(text: str) -> int:
    """Triton kernels in the text."""
    return text.count("custom_call @__gpu$xla.gpu.triton")
