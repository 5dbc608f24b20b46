"""A seccomp filter that leaves a Python program nothing but computing and reading files.

The filter is a list of what is allowed, not of what is forbidden: every other system call fails with EACCES, among them all
that make processes or threads, send signals, open sockets, open files for writing, and rename, remove or change files. It
is a classic BPF program over `struct seccomp_data` (linux/seccomp.h, seccomp(2)).
"""

import errno
import json
import pathlib
import platform
import struct
from collections.abc import Mapping

_ALLOWED = pathlib.Path(__file__).parents[1] / "data" / "system_calls.json"
"""Each call's numbers on x86_64 and aarch64, from the kernel's tables; null where the architecture has no such call."""
# number of the call and of the argument that holds its flags
_OPENING: Mapping[str, tuple[tuple[int, int], ...]] = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
_FCNTL: Mapping[str, int] = {"x86_64": 72, "aarch64": 25}
_ARCHITECTURES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h. A call by another convention, such as int 0x80, ends the program."""

# O_WRONLY | O_RDWR, O_CREAT, O_TRUNC, __O_TMPFILE: the same on both architectures
_WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000
_HARMLESS_FCNTL = (1, 2, 3)
"""F_GETFD, F_SETFD, F_GETFL; F_SETOWN with F_SETSIG would send signals to other processes."""

_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EACCES
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`."""


def is_supported() -> bool:
    """Whether the tables know this machine's system calls."""
    return platform.system() == "Linux" and platform.machine() in _ARCHITECTURES and struct.calcsize("P") == 8


def program() -> bytes:
    """The filter for this machine, an array of `struct sock_filter`, 8 bytes an instruction; for `is_supported` machines."""
    machine = platform.machine()
    column = list(_ARCHITECTURES).index(machine)
    code = [_instruction(_LOAD, _ARCHITECTURE), _instruction(_JUMP_EQUAL, _ARCHITECTURES[machine], 1, 0),
            _instruction(_RETURN, _KILL_PROCESS), _instruction(_LOAD, _NUMBER)]
    for numbers in json.loads(_ALLOWED.read_text(encoding="utf-8")).values():
        if (number := numbers[column]) is not None:
            code += [_instruction(_JUMP_EQUAL, number, 0, 1), _instruction(_RETURN, _ALLOW)]
    for number, argument in _OPENING[machine]:
        code += [_instruction(_JUMP_EQUAL, number, 0, 4), _load_argument(argument),
                 _instruction(_JUMP_ANY_BIT, _WRITING, 0, 1), _instruction(_RETURN, _FAIL), _instruction(_RETURN, _ALLOW)]
    code += [_instruction(_JUMP_EQUAL, _FCNTL[machine], 0, 1 + 2 * len(_HARMLESS_FCNTL)), _load_argument(1)]
    for command in _HARMLESS_FCNTL:
        code += [_instruction(_JUMP_EQUAL, command, 0, 1), _instruction(_RETURN, _ALLOW)]
    return b"".join([*code, _instruction(_RETURN, _FAIL)])


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _load_argument(index: int) -> bytes:
    """Loads the low half, which is all that flags and commands take, of an argument."""
    return _instruction(_LOAD, _ARGUMENTS + 8 * index)
