"""Commands as a user types them."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def command(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"experiments.{name}", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)


def fails_with(result, *parts):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr and not result.stdout
    for part in parts:
        assert part in errors[0]
