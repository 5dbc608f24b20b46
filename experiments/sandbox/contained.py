"""The process that one untrusted program runs in; `code_execution` starts it with `python -I -S`, as a file.

It reads its job as JSON from stdin, gives up every right that the program does not need, says so, runs the program, and
says on the pipe that was its stdout how that ended. It imports nothing but the standard library, which is all there is on
its path at the start.
"""

import ctypes
import json
import os
import resource
import struct
import sys
import types

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL, _SECCOMP_MODE_FILTER = 9, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
"""System calls, the same on every architecture (landlock(7))."""
_LANDLOCK_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
# execute, write, read, remove and make, then by version: refer (2), truncate (3), ioctl of devices (5)
_FIRST_RIGHTS, _LATER_RIGHTS = (1 << 13) - 1, ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
_MOST_DETAIL = 300


class Refused(Exception):
    """A containment can't be set up; the message says which."""


def main() -> None:
    job = json.load(sys.stdin.buffer)
    sys.path.append(job["libraries"])
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        _contain(job)
    except (Refused, OSError, ValueError) as error:
        _say(verdict, f"refused {error}")
        return
    _say(verdict, "ready")
    _say(verdict, _run(job["program"]))
    os._exit(0)  # what the program registered for the exit is not run


def _contain(job: dict) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *4 * [ctypes.c_ulong]]
    _call(libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl")
    _call(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if job["readable"] is not None:
        _restrict_reading(libc, job["readable"])
    for name, value in job["limits"].items():
        _limit(getattr(resource, name), value)
    code = bytes.fromhex(job["filter"])
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions)))
    _call(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0), "seccomp")


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)  # which only root may raise
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))


def _restrict_reading(libc: ctypes.CDLL, paths: list) -> None:
    """Lets only files under these paths be opened, and none be written."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    _call(version, "Landlock")
    rights = _FIRST_RIGHTS | sum(right for since, right in _LATER_RIGHTS if version >= since)
    rules = _call(libc.syscall(_LANDLOCK_CREATE, struct.pack("@Q", rights), ctypes.c_size_t(8), 0), "Landlock")
    for path in paths:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
            rule = struct.pack("=Qi", allowed, place)
            _call(libc.syscall(_LANDLOCK_ADD_RULE, rules, _PATH_BENEATH, rule, 0), "Landlock")
            os.close(place)
    _call(libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


def _call(result: int, name: str) -> int:
    if result < 0:
        raise Refused(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _run(program: str) -> str:
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as error:
        return f"failed {_describe(error)}"
    return "passed"


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException:  # the program's own class may raise anything
        return name
    return f"{name}: {text}"[:_MOST_DETAIL] if text else name


def _say(pipe: int, text: str) -> None:
    os.write(pipe, (text + "\n").encode(errors="replace"))


if __name__ == "__main__":
    main()
