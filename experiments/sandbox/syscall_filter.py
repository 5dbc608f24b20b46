"""A seccomp filter that leaves a Python program nothing but computing and reading files.

The filter is a list of what is allowed, not of what is forbidden: every other system call fails with EACCES, among them all
that make processes or threads, send signals, open sockets, open files for writing, and rename, remove or change files. It
is a classic BPF program over `struct seccomp_data` (linux/seccomp.h, seccomp(2)).
"""

import errno
import platform
import struct
from collections.abc import Mapping

# (x86_64, aarch64), from the kernel's tables; None where the architecture has no such call
_ALLOWED: Mapping[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "select": (23, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "getrandom": (318, 278),
    "statx": (332, 291), "faccessat2": (439, 439),
}
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
    for numbers in _ALLOWED.values():
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
