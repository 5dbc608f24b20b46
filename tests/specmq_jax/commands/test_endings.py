"""How commands end: in one line and with the exit status that `errors` documents, whatever happens to them."""

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
from typed import commands

ROOT = pathlib.Path(__file__).parents[3]
FP16 = ROOT / "tests" / "data" / "checkpoints" / "fp16"
INSPECT, CONVERT = ("checkpoints_tools.inspect", FP16), ("checkpoints_tools.convert", FP16)
PROGRAM = """
import gc, json, os, sys, tempfile
from absl import flags
from specmq_jax import errors
from specmq_jax.commands import entry

flags.DEFINE_float("share", 0.5, "A number.")
flags.DEFINE_list("names", None, "Some.")
flags.DEFINE_string("text", None, "A text.")

def main(argv):
    for step in argv[1:]:
        exec(step)

def outcome(arguments):
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()  # what was imported serves all of them
        if not child:
            os.dup2(told.fileno(), 2)
            sys.argv[1:] = arguments
            entry.run(main)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        return told.read().splitlines(), status

gc.freeze()  # no fork looks through what was imported
print(json.dumps([outcome(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def run(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True, timeout=120,
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)


def program(*arguments, **options):
    """Runs `PROGRAM` with each of the lists of arguments; the lines that it wrote to stderr and its exit status, of each."""
    result = run("-c", PROGRAM, json.dumps(arguments), **options)
    return json.loads(result.stdout.splitlines()[-1])


def environment(**changed):
    return {**os.environ, **changed}


def ends(result, status, *parts):
    lines = result.stderr.splitlines()
    assert result.returncode == status and len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


ERRORS = [
    ("1 / 0", 1, "internal error: ZeroDivisionError: division by zero"),
    ("raise MemoryError", 2, "error: this machine's memory does not suffice"),
    (f"raise OSError({errno.ENOSPC}, 'No space left on device', 'a')", 2, "error: a can't be written: No space left"),
    ("open('/nowhere/a')", 2, "error: /nowhere/a can't be used: No such file or directory"),
    ("raise errors.UserError('two\\nlines')", 2, "error: two lines"),
    ("raise errors.UserError('caf\\udce9')", 2, "error: caf\\udce9"),
    ("'\\ud83d'.encode()", 2, "half of a surrogate pair"),
    ("raise RuntimeError('callback raised KeyboardInterrupt: <EMPTY MESSAGE>')", 130, "interrupted"),
]
VALUES = [
    ("--share=nan", "--share=nan is no finite number"), ("--share=-inf", "--share=-inf is no finite number"),
    ("--names=", "--names= has an empty entry"), ("--names=a,,b", "--names=a,,b has an empty entry"),
    ("--text=", "--text is empty"), ("", "an argument is empty"), ("--share=x", "x"), ("--nope", "Unknown command line flag"),
    (os.fsdecode(b"--text=caf\xe9"), "is no text in this terminal's encoding")]


def test_an_error_is_one_line():
    for (step, status, line), (told, found) in zip(ERRORS, program(*([step] for step, _, _ in ERRORS)), strict=True):
        assert found == status and len(told) == 1 and line in told[0], (step, told)


def test_debug_shows_the_traceback_and_keeps_the_status():
    [(told, status)] = program(["raise errors.UserError('no')", "--debug"])
    assert status == 2 and told[0].startswith("Traceback") and told[-1] == "error: no"


def test_values_that_no_flag_takes():
    for (flag, fault), (told, status) in zip(VALUES, program(*([flag] for flag, _ in VALUES)), strict=True):
        assert status == 2 and len(told) == 1 and fault in told[0], (flag, told)


def test_a_flag_of_other_commands_is_refused():
    speedup, chat, unknown = commands(
        ("experiments.speedup", "--model=x"), ("experiments.chat", "--question_end=1"),
        ("experiments.chat", f"--model={FP16}", "--draft_precision=w3"), shared="experiments.running.flags")
    ends(speedup, 2, "--model has no use here")
    ends(chat, 2, "--question_end has no use here: it belongs to benchmarks")
    ends(unknown, 2, "precision 'w3' is not known")


def test_help_lists_every_flag_on_stdout():
    listed = {
        "checkpoints_tools.quantize": ("SRC DST", "--head_precision", "--calibration_length", "Default: 128"),
        "experiments.gsm8k": ("python -m experiments.gsm8k", "--max_new_tokens", "Tokens a turn at most", "--[no]resume"),
        "experiments.chat": ("--model", "--draft_precision", "--max_length"),
        "experiments.serve": ("--model", "--draft_precision", "--max_length", "--port")}
    for (name, parts), result in zip(listed.items(), commands(*((name, "--help") for name in listed)), strict=True):
        assert result.returncode == 0 and not result.stderr
        for part in (*parts, "--[no]debug", "--version"):
            assert part in result.stdout, name
        assert "--pdb" not in result.stdout


def test_the_version_is_one():
    result = run("-m", *INSPECT, "--version")
    assert result.returncode == 0 and result.stdout.startswith("specmq-jax ")
    assert run("-m", "checkpoints_tools.train_eagle", "--version").stdout == result.stdout
    assert run("-c", "import specmq_jax; print('specmq-jax', specmq_jax.__version__)").stdout == result.stdout


def test_a_command_keeps_its_own_version_flag(tmp_path):
    ends(run("-m", "checkpoints_tools.train_eagle", FP16, tmp_path / "head", "--version=4"), 2, "version", "2", "3")


def test_a_reader_that_has_gone_and_a_full_output():
    reading, writing = os.pipe()
    os.close(reading)
    result = run("-m", *INSPECT, stdout=writing)
    os.close(writing)
    assert result.returncode == 141 and not result.stderr
    with open("/dev/full", "w") as full:
        ends(run("-m", *INSPECT, stdout=full), 2,
             "the output can't be written: No space left on device")


def test_a_terminal_that_knows_ascii_alone(tmp_path):
    (tmp_path / "mod\u00e8le").symlink_to(FP16)
    result = run("-m", "checkpoints_tools.inspect", tmp_path / "mod\u00e8le", env=environment(PYTHONIOENCODING="ascii"))
    assert result.returncode == 0, result.stderr
    assert "mod\\xe8le" in result.stdout.replace("\n", "") and result.stdout.isascii()


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_missing_back_end(platform):
    [(told, status)] = program(["import jax; jax.devices()"], env=environment(JAX_PLATFORMS=platform))
    assert status == 2 and told[-1].startswith(f"error: JAX can't run on '{platform}', which JAX_PLATFORMS names")


def test_a_full_disk_leaves_nothing(tmp_path):
    def limit():  # stands for a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = run("-m", *CONVERT, tmp_path / "made", preexec_fn=limit)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (f"error: {tmp_path}/made can't be written: File too large; make room there, or "
                                              "choose another place")
    assert not os.listdir(tmp_path)


def test_the_library_leaves_signals_to_whoever_imports_it():
    code = ("import signal, experiments.running.flags, checkpoints_tools.convert, experiments.tune\n"
            "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, int(signal.getsignal(signal.SIGTERM)))")
    assert run("-c", code).stdout.split() == ["True", "0"]
