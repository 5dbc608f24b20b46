"""What keeps a model's program from doing harm, and what it may do all the same."""

import os
import pathlib
import struct
import subprocess
import time
import types

import pytest

from experiments.sandbox import code_execution, syscall_filter
from experiments.sandbox.code_execution import Limits
from specmq_jax.errors import UserError

SMALL = Limits(seconds=1, memory=1 << 28)


def run(program, limits=SMALL):
    return code_execution.run(program, limits)


@pytest.mark.parametrize("program", [
    "", "assert sorted([3, 1, 2]) == [1, 2, 3]", "import numpy\nassert numpy.arange(4).sum() == 6",
    "import collections, decimal, hashlib, heapq, itertools, math, random, re, string, typing\n"
    "assert hashlib.md5(b'a').hexdigest().startswith('0cc1')",
    "import time\nstart = time.time()\ntime.sleep(0.01)\nassert time.time() > start",
    "print('x' * 10**6)\nimport sys\nsys.stderr.write('x' * 10**6)",
    "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: 'int' = 1\nassert Point().x == 1",
])
def test_a_program_that_computes_passes(program):
    assert run(program) == code_execution.Outcome(passed=True, detail="")


@pytest.mark.parametrize(("program", "detail"), [
    ("assert 1 == 2, 'no'", "AssertionError: no"), ("f(", "SyntaxError: '(' was never closed (program, line 1)"),
    ("undefined", "NameError: name 'undefined' is not defined"), ("input()", "EOFError: EOF when reading a line"),
    ("import sys\nsys.exit(0)", "SystemExit: 0"),
    ("import os\nos._exit(0)", "ended with exit code 0 before its tests were done"),
    ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
    ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
    ("class Loud(Exception):\n    def __str__(self):\n        raise self\nraise Loud", "Loud"),
    ("raise ValueError('x' * 10**6)", "ValueError: " + 288 * "x"), ("raise ValueError('two\\nlines')", "ValueError: two lines"),
])
def test_a_program_that_fails_says_why_in_one_line(program, detail):
    assert run(program) == code_execution.Outcome(passed=False, detail=detail)


@pytest.mark.parametrize("program", [
    "while True: pass", "import time\ntime.sleep(60)",
    "import signal\nfor number in (signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)\n"
    "while True: pass",
    "import os\nwhile True: os.write(2, b'x' * 1000)",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
])
def test_a_program_that_does_not_end_is_ended(program):
    start = time.monotonic()
    assert run(program, Limits(seconds=0.5)) == code_execution.Outcome(passed=False, detail="timed out after 0.5 s")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("program", [
    "bytearray(10 << 30)", "parts = []\nwhile True: parts.append(bytes(10**7))", "'x' * 10**10",
    "import mmap\nmmap.mmap(-1, 10 << 30)",
])
def test_memory_is_limited(program):
    outcome = run(program)
    assert not outcome.passed and ("MemoryError" in outcome.detail or "Cannot allocate memory" in outcome.detail)


@pytest.mark.parametrize("program", [
    "os.fork()", "while True: os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])",
    "subprocess.run(['true'])", "os.system('true') and 1 / 0", "multiprocessing.Process(target=print).start()",
    "threading.Thread(target=print).start()", "concurrent.futures.ProcessPoolExecutor(2).submit(print)",
    "os.kill(os.getppid(), signal.SIGKILL)", "os.killpg(0, signal.SIGKILL)", "signal.raise_signal(signal.SIGTERM)",
    "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
])
def test_a_program_makes_no_process_and_reaches_none(program):
    outcome = run(f"import concurrent.futures, fcntl, multiprocessing, os, resource, signal, subprocess, threading\n{program}")
    assert not outcome.passed
    assert "PermissionError" in outcome.detail or "can't start new thread" in outcome.detail or program.startswith("os.system")


@pytest.mark.parametrize("program", [
    "socket.socket()", "socket.socketpair()", "socket.create_connection(('127.0.0.1', 9), timeout=0.1)",
    "socket.socket(socket.AF_UNIX)", "urllib.request.urlopen('http://127.0.0.1:9', timeout=0.1)", "asyncio.run(nothing())",
])
def test_a_program_opens_no_socket(program):
    outcome = run(f"import asyncio, socket, urllib.request\nasync def nothing(): pass\n{program}")
    assert not outcome.passed and "Permission denied" in outcome.detail


@pytest.mark.parametrize("program", [
    "os.remove(FILE)", "os.truncate(FILE, 0)", "open(FILE, 'w')", "open(FILE, 'a')", "open(FILE, 'r+')", "os.chmod(FILE, 0)",
    "os.rename(FILE, FILE + '2')", "os.link(FILE, FILE + '2')", "os.symlink(FILE, FILE + '2')", "os.utime(FILE)",
    "shutil.rmtree(FOLDER)", "os.rmdir(FOLDER)", "os.mkdir(FOLDER + '/new')", "open(FOLDER + '/new', 'x')",
    "os.mkfifo(FOLDER + '/new')", "tempfile.TemporaryFile()", "os.open(FOLDER, os.O_RDWR | os.O_TMPFILE)",
    "os.memfd_create('hidden')", "os.open(FILE, os.O_RDONLY | os.O_TRUNC)", "os.chdir(FOLDER)",
    "os.setxattr(FILE, 'user.a', b'')",
    "ctypes.CDLL(None).syscall(437, -100, FILE.encode(), b'\\2' + bytes(23), 24) == -1 and 1 / 0",
])
def test_a_program_changes_no_file(program, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("kept")
    before = (folder / "file").stat()
    outcome = run(f"import ctypes, os, shutil, tempfile\nFOLDER, FILE = {str(folder)!r}, {str(folder / 'file')!r}\n{program}")
    assert not outcome.passed, program
    assert [path.name for path in folder.iterdir()] == ["file"] and (folder / "file").read_text() == "kept"
    after = (folder / "file").stat()
    assert (before.st_mode, before.st_mtime_ns, before.st_nlink) == (after.st_mode, after.st_mtime_ns, after.st_nlink)


def test_a_program_reads_no_file_but_pythons_own(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for program in (f"open({str(secret)!r})", f"import os\nos.listdir({str(tmp_path)!r})", "open('/proc/self/environ')"):
        assert "Permission denied" in run(program).detail
    assert run("import this").passed
    assert run(f"assert open({str(secret)!r}).read() == 'secret'", Limits(read_restricted=False)).passed


def test_a_program_sees_nothing_of_the_environment_and_of_open_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMQ_SECRET", "secret")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert run("import os\nassert 'SPECMQ_SECRET' not in os.environ").passed
        assert not run(f"import os\nos.write({file.fileno()}, b'x')").passed
    assert (tmp_path / "open").read_text() == ""


@pytest.mark.parametrize("program", ["while True: pass", "import os\nos.close(0)\nos.close(1)\nwhile True: pass", ""])
def test_nothing_of_a_program_is_left_running(program, monkeypatch):
    started = []

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(code_execution.subprocess, "Popen", start)
    run(program, Limits(seconds=0.2))
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


def refusing(tmp_path, monkeypatch, old, new):
    """Programs are run by a copy in which a kernel facility is missing."""
    path = tmp_path / "contained.py"
    source = pathlib.Path(code_execution.contained.__file__).read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    monkeypatch.setattr(code_execution, "contained", types.SimpleNamespace(__file__=str(path)))


def test_where_files_can_not_be_kept_from_reading_nothing_is_run_unless_allowed(tmp_path, monkeypatch):
    refusing(tmp_path, monkeypatch, "_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444",
             "_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 4444")
    with pytest.raises(UserError, match="Landlock: Function not implemented.*--allow_file_reading") as error:
        code_execution.check(SMALL)
    assert "\n" not in str(error.value)
    code_execution.check(Limits(read_restricted=False))


def test_without_a_filter_nothing_is_run(tmp_path, monkeypatch):
    refusing(tmp_path, monkeypatch, "_SECCOMP_MODE_FILTER = 9, 2", "_SECCOMP_MODE_FILTER = 9, 77")
    with pytest.raises(UserError, match=r"can't be contained here \(seccomp: Invalid argument\)"):
        run("raise SystemExit")


def test_on_an_unknown_machine_nothing_is_run(monkeypatch):
    monkeypatch.setattr(syscall_filter.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="Linux on x86_64 and aarch64 only"):
        run("")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_decides_every_call(machine, monkeypatch):
    """Interprets the program: every path ends in a verdict, and only harmless calls are allowed."""
    monkeypatch.setattr(syscall_filter.platform, "machine", lambda: machine)
    code = [struct.unpack("<HBBI", syscall_filter.program()[i:i + 8]) for i in range(0, len(syscall_filter.program()), 8)]
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(number, arguments=(0,) * 6, architecture=architecture):
        data, place, loaded = struct.pack("<IIQ6Q", number, architecture, 0, *arguments), 0, 0
        while True:
            kind, yes, no, value = code[place]
            place += 1
            if kind == 0x06:
                return value
            if kind == 0x20:
                (loaded,) = struct.unpack_from("<I", data, value)
            else:
                place += yes if (loaded == value if kind == 0x15 else loaded & value) else no

    allow, fail, kill = 0x7FFF0000, 0x0005000D, 0x80000000
    opening = {"x86_64": 257, "aarch64": 56}[machine]
    assert verdict(opening, (0, 0, os.O_RDONLY | os.O_CLOEXEC, 0, 0, 0)) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, 0o20200000):
        assert verdict(opening, (0, 0, flags, 0, 0, 0)) == fail
    assert verdict(0, architecture=0x40000003) == kill
    # clone, execve, kill, socket, unlinkat, renameat, ptrace, prctl, io_uring_setup
    forbidden = {"x86_64": (56, 57, 58, 59, 62, 41, 87, 263, 264, 101, 157, 425, 437, 435),
                 "aarch64": (220, 221, 129, 198, 35, 38, 117, 167, 425, 437, 435)}[machine]
    assert {verdict(number) for number in forbidden} == {fail}
    assert {verdict(number | 0x40000000) for number in range(500)} == {fail}
    assert {verdict(number) for number in range(500)} == {allow, fail}
