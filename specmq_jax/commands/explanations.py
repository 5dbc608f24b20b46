"""What errors of libraries and of the system mean to a user."""

import sys

from specmq_jax import files
from specmq_jax.errors import UserError

_DEVICE_MEMORY = "RESOURCE_EXHAUSTED"


def explained(error: BaseException) -> UserError | None:
    """The `UserError` that an error of another kind amounts to, where not the program but the machine is at fault."""
    text = find(error)
    return None if text is None else UserError(text)


def find(error: BaseException) -> str | None:
    """One line on an error behind which the user's machine or files stand; None for one that may be the program's."""
    if reason := files.full_disk(error):
        place = getattr(error, "filename", None)
        return f"{place or 'the output'} can't be written: {reason}; {files.ADVICE}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} can't be used: {error.strerror}"
    if isinstance(error, MemoryError):
        return "this machine's memory does not suffice; choose a smaller model or shorter lengths"
    if isinstance(error, UnicodeEncodeError) and error.encoding.startswith("utf"):
        return f"{ascii(error.object)[:100]} holds half of a surrogate pair, which is no text; correct the file or rename it"
    if _DEVICE_MEMORY in str(error) and isinstance(error, RuntimeError):
        return (f"the device ran out of memory ({str(error).splitlines()[0][:160]}); choose a lower --precision or a shorter "
                "--max_length")
    return _missing_device()


def _missing_device() -> str | None:
    """What is wrong where JAX has no device at all: the error at hand follows from that, whatever it says."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except Exception as error:
        lines = str(error).splitlines() or ["no such device was found"]
        asked = jax.config.values["jax_platforms"]
        return (f"JAX can't run on {asked!r}, which JAX_PLATFORMS names ({lines[0][:200]}); " if asked else
                f"JAX finds no device ({lines[0][:200]}); ") + (
                "a GPU needs specmq-jax[cuda12] or [cuda13], and JAX_PLATFORMS=cpu chooses the processor")
    return None
