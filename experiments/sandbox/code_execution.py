"""Runs programs that nobody has read, each in a process of its own that can only compute and read Python's own files.

Three things of the Linux kernel contain it, none of which needs root: resource limits (memory, processor time, size of
files), a seccomp filter without any call that writes files, makes processes, sends signals or opens sockets, and Landlock,
which leaves only the interpreter's and the libraries' directories to be read. The parent ends what runs too long. Where one
of these is missing, no program is run.

A program that sets out to fake its verdict can do so, since its tests run in the same interpreter, as in the harness that
HumanEval was published with (arXiv:2107.03374).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import sysconfig
import time

import numpy as np

from experiments.sandbox import contained, syscall_filter
from specmq_jax.errors import UserError

_START_SECONDS = 30.0
"""For the interpreter to start, also on a machine under load; not counted against the program."""
_LONGEST_LINE = 4096
_SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
                 "/dev/null", "/dev/urandom")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
      seconds: of wall time and, rounded up, of processor time.
      memory: bytes of address space, the interpreter's own counted.
      read_restricted: only Python's own files and the system's libraries can be read.
    """

    seconds: float = 3.0
    memory: int = 1 << 30
    read_restricted: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended: it passed, or the `detail` says why not in one line."""

    passed: bool
    detail: str


def check(limits: Limits) -> None:
    """Runs an empty program.

    Raises:
      UserError: as `run`.
    """
    outcome = run("", limits)
    if not outcome.passed:
        raise UserError(f"an empty program does not run on this machine ({outcome.detail}); check the Python installation")


def run(program: str, limits: Limits) -> Outcome:
    """Runs a Python program; it passes if it comes to its end without an exception.

    The standard library and NumPy can be imported. Nothing it prints is kept.

    Raises:
      UserError: a containment can't be set up on this machine; the program was not run.
    """
    if not syscall_filter.is_supported():
        raise UserError("programs can be contained on Linux on x86_64 and aarch64 only, and are not run elsewhere; take the "
                        "answer file to such a machine and score it there with --score=FILE")
    job = json.dumps({"program": program, "filter": syscall_filter.program().hex(), "libraries": _libraries(),
                      "readable": _readable() if limits.read_restricted else None, "limits": _resource_limits(limits)})
    # -I -S: no environment variable, user directory or .pth file decides what the program imports
    process = subprocess.Popen([sys.executable, "-I", "-S", contained.__file__], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", env=_environment(),
                               start_new_session=True)
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.encode())
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        first = _line(process, _START_SECONDS)
        if first != "ready":
            raise UserError(_refusal(first, process))
        word, _, detail = (_line(process, limits.seconds) or "silent").partition(" ")
        if word == "silent":
            detail = _ending(process, limits)
        return Outcome(passed=word == "passed", detail=detail)
    finally:
        # before `wait`, while the process still holds its id
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def _line(process: subprocess.Popen, seconds: float) -> str | None:
    """The next line of the process's output; None where none comes in time, or it ends or says too much."""
    pipe, said, end = process.stdout.fileno(), b"", time.monotonic() + seconds
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        # byte by byte, since the line after it may be there already
        byte = os.read(pipe, 1) if ready else b""
        if not byte or len(said) == _LONGEST_LINE:
            return None
        said += byte
    return said.decode(errors="replace").rstrip("\n")


def _ending(process: subprocess.Popen, limits: Limits) -> str:
    """Why a program said nothing."""
    try:
        code = process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return f"timed out after {limits.seconds:g} s"
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return f"timed out after {limits.seconds:g} s"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} before its tests were done"


def _refusal(line: str | None, process: subprocess.Popen) -> str:
    if line is None or not line.startswith("refused "):
        return (f"the process for programs did not start ({_ending(process, Limits(seconds=_START_SECONDS))}); no program was "
                "run")
    reason = line.removeprefix("refused ")
    if reason.startswith("Landlock"):
        return (f"programs can't be kept from reading files here ({reason}), and are not run; use a kernel with Landlock "
                "(Linux 5.13 or later, not switched off by a container), or allow reading with --allow_file_reading")
    return (f"programs can't be contained here ({reason}), and are not run; score the answer file on another machine with "
            "--score=FILE")


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {"RLIMIT_AS": limits.memory, "RLIMIT_CPU": int(limits.seconds) + 1, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": 0}


def _libraries() -> str:
    """The directory that NumPy lies in, which solutions may import."""
    return str(pathlib.Path(np.__file__).parents[1])


def _readable() -> list[str]:
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], paths["platstdlib"], f"{sys.base_prefix}/lib", _libraries()]
    return [*own, *_SYSTEM_PATHS, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]


def _environment() -> dict[str, str]:
    # no thread can be made there
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return single | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
