"""Ctrl-C and SIGTERM end a command at any moment, in one line, and leave nothing half written."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[3]
DATA = ROOT / "tests" / "data"
FP16 = DATA / "checkpoints" / "fp16"
INSPECT = ("checkpoints_tools.inspect", FP16)
CONVERT = ("checkpoints_tools.convert", FP16, "OUT/made")
DEAF = """
import time
from specmq_jax.commands import entry

class Deaf:
    def __del__(self):  # where Python can only report an exception
        print("deaf", flush=True)
        time.sleep(2)

def main(argv):
    del argv
    Deaf()
    time.sleep(60)

entry.run(main)
"""
HELD = """
import sys, time
from specmq_jax import files
from specmq_jax.commands import entry

def main(argv):
    with files.staged(argv[1]) as directory, files.scratch("work"):
        (directory / "a").write_text("half")
        print("held", flush=True)
        time.sleep(60)

entry.run(main)
"""
SAVING = """
import sys, threading, time
from specmq_jax.commands import entry
from specmq_jax.formats import DenseFormat
from specmq_jax.loading import checkpoint
from specmq_jax.network.parameters import Formats

class Library:
    def save(self, shard, args):
        def write():
            print("saving", flush=True)
            for i in range(2000):
                (shard / str(i)).mkdir(parents=True, exist_ok=True)
                time.sleep(0.0005)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join()

def main(argv):
    checkpoint._checkpointer = Library
    dense = DenseFormat(kind="fp32")
    with checkpoint.CheckpointWriter(argv[1], config={}, formats=Formats(linear=dense, head=dense, embed=dense),
                                     source={}) as writer:
        writer._pending = {"a": 1}

entry.run(main)
"""


def started(directory, arguments):
    for name in ("out", "tmp", "cache"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(directory / "tmp"), "SPECMQ_CACHE": str(directory / "cache")}
    command = [str(argument).replace("OUT", str(directory / "out")) for argument in arguments]
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


def ended(process, number, status, word):
    process.send_signal(number)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == status, told
    assert told.splitlines().count(word) == 1 and "Traceback" not in told and "Exception ignored" not in told, told
    return printed


def half_written(directory):
    return [path for path in directory.rglob("*") if ".partial" in path.name] + list((directory / "tmp").iterdir())


def interrupt_at(directory, arguments, seconds):
    """Says whether the command was still running then."""
    process = started(directory, ["-m", *arguments])
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (0, 130), f"at {seconds:.2f} s: {told}"
    assert told.splitlines().count("interrupted") == (process.returncode == 130), f"at {seconds:.2f} s: {told}"
    assert "Traceback" not in told and "Exception ignored" not in told, f"at {seconds:.2f} s: {told}"
    assert not half_written(directory), f"at {seconds:.2f} s"
    return process.returncode == 130


def duration(directory, arguments):
    start = time.monotonic()
    process = started(directory, ["-m", *arguments])
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return time.monotonic() - start


def starting():
    """Seconds that Python itself takes to start and end, on a machine as busy as this one is at the moment."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import threading"], check=True)
    return time.monotonic() - start


@pytest.mark.parametrize(("arguments", "moments"), [(INSPECT, (0.5, 1.0)), (CONVERT, (0.6, 1.5, 2.5))])
def test_some_moments_of_cheap_commands(tmp_path, arguments, moments):
    found = [interrupt_at(tmp_path / str(seconds), arguments, seconds) for seconds in moments]
    assert found[0]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    INSPECT, CONVERT,
    ("checkpoints_tools.export", FP16, "OUT/made", "--format=hf"),
    ("checkpoints_tools.quantize", FP16, "OUT/made", "--precision=w4a16-g64", "--algorithm=gptq", "--calibration_count=4",
     f"--calibration={DATA / 'smollm2_135m_greedy.json'}", "--calibration_length=64"),
    ("experiments.mt_bench", f"--model={FP16}", "--max_new_tokens=8", "--question_end=2", "--max_length=900",
     "--draft_precision=w4a16-g64", "--output_dir=OUT/made"),
    ("experiments.sweep", f"--model={FP16}", "--max_new_tokens=8", "--question_end=1", "--max_length=900",
     "--draft_precision=w4a16-g64", "--precisions=fp16,w4a16-g64", "--output_dir=OUT/made"),
    ("checkpoints_tools.train_eagle", FP16, "OUT/made", f"--prompts={ROOT / 'experiments/data/mt_bench_small.jsonl'}",
     "--version=2", "--max_new_tokens=16", "--length=900", "--epochs=0.1", "--batch=1", "--drafts=1"),
], ids=lambda arguments: arguments[0])
def test_random_moments(tmp_path, arguments):
    whole = duration(tmp_path / "whole", arguments)
    draw = random.Random(0)
    for i in range(30):
        interrupt_at(tmp_path / str(i), arguments, draw.uniform(min(3 * starting(), whole), whole))


@pytest.mark.parametrize(("number", "status", "word"), [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")])
def test_what_is_half_written_goes(tmp_path, number, status, word):
    process = started(tmp_path, ["-c", HELD, "OUT/made"])
    assert process.stdout.readline() == "held\n" and len(half_written(tmp_path)) == 3
    ended(process, number, status, word)
    assert not half_written(tmp_path) and not os.listdir(tmp_path / "out")


def test_what_a_librarys_threads_still_write_goes(tmp_path):
    process = started(tmp_path, ["-c", SAVING, "OUT/made"])
    assert process.stdout.readline() == "saving\n"
    ended(process, signal.SIGINT, 130, "interrupted")
    assert not half_written(tmp_path) and not os.listdir(tmp_path / "out")


def test_an_interrupt_in_a_finaliser_is_not_lost(tmp_path):
    process = started(tmp_path, ["-c", DEAF])
    assert process.stdout.readline() == "deaf\n"
    ended(process, signal.SIGINT, 130, "interrupted")


def test_ignored_signals_stay_ignored(tmp_path):
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)" + HELD.replace("sleep(60)", "sleep(1)")
    process = started(tmp_path, ["-c", code, "OUT/made"])
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0 and (tmp_path / "out" / "made" / "a").exists()
