"""Commands as a user types them."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
FORKS = """
import gc, importlib, json, os, runpy, sys, tempfile

def outcome(module, arguments):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv[1:] = arguments
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = []
        for file in (out, err):
            file.seek(0)
            told.append(file.read().decode())
        return status, *told

shared, typed = json.loads(sys.argv[1])
importlib.import_module(shared)
gc.freeze()  # no fork looks through what was imported
print(json.dumps([outcome(*each) for each in typed]))
"""


def command(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"experiments.{name}", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)


def commands(*typed, shared="specmq_jax", environment=None):
    """How several commands end, each a module and its arguments: forks of one process, which has imported `shared` for all."""
    asked = json.dumps([shared, [(module, [str(argument) for argument in arguments]) for module, *arguments in typed]])
    result = subprocess.run([sys.executable, "-c", FORKS, asked], cwd=ROOT, text=True, capture_output=True, timeout=300,
                            env={**os.environ, **(environment or {})})
    assert result.returncode == 0, result.stderr
    return [subprocess.CompletedProcess(each, *outcome) for each, outcome in zip(typed, json.loads(result.stdout), strict=True)]


def fails_with(result, *parts):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr and not result.stdout
    for part in parts:
        assert part in errors[0]
