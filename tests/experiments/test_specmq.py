"""The one program: it names every command, and runs one as `python -m` does."""

import ast
import configparser
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import specmq

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("checkpoints_tools", "experiments", "pallas_kernels", "specmq_jax")
MODULES = [module for group in specmq.GROUPS.values() for module in group.values()]


@pytest.fixture(scope="module")
def program():
    """What pip writes into the script that it installs, by setup.cfg's entry point."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "specmq"
    code = f"import sys; sys.argv[0] = 'specmq'; from {module} import {function}; sys.exit({function}())"
    return [sys.executable, "-c", code]


@pytest.fixture
def run(program, tmp_path):
    """Runs the program away from the repository, as its users do."""
    def run(*arguments):
        return subprocess.run([*program, *map(str, arguments)], text=True, capture_output=True, timeout=120, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})

    return run


def commands():
    """Every module that is a command: it ends the process by `run`, or a benchmark's `main` does, and no worker does."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
                     and any(call in ast.unparse(node) for call in ("run(main", "benchmark_command.main("))]
            if calls:
                yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_command_has_one_name():
    assert sorted(MODULES) == sorted(commands())


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_has_a_line_for_each_command(run, arguments):
    found = run(*arguments)
    assert found.returncode == 0 and not found.stderr
    told = {line.split()[0]: line for line in found.stdout.splitlines() if line.startswith("  ")}
    assert set(told) == {name for group in specmq.GROUPS.values() for name in group}
    assert all(len(line.split()) > 3 and "python -m" not in line and len(line) < 128 for line in told.values())


def test_the_list_needs_no_jax():
    code = "import sys; from experiments import specmq; specmq.page(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_its_version_is_the_packages(run):
    found = run("--version")
    assert found.returncode == 0 and found.stdout.split() == ["specmq-jax", importlib.metadata.version("specmq-jax")]


@pytest.mark.parametrize(("name", "hint"), [
    ("covnert", "did you mean convert?"), ("sevre", "did you mean serve or sweep?"),
    ("--model=own", "specmq --help lists the commands"), ("zzz", "specmq --help lists the commands")])
def test_an_unknown_command_is_one_line(run, name, hint):
    found = run(name, "--help")
    assert found.returncode == 2 and not found.stdout
    assert found.stderr == f"error: specmq has no command {name!r}; {hint}\n"


@pytest.mark.parametrize("name", ["rank_vocabulary", "rank-vocabulary"])
def test_a_command_is_what_python_runs(run, name, tmp_path):
    """In a directory whose folders bear the packages' names, too."""
    (tmp_path / "checkpoints_tools").mkdir()
    (tmp_path / "checkpoints_tools" / "__init__.py").write_text("raise ValueError")
    module = subprocess.run([sys.executable, "-m", "checkpoints_tools.rank_vocabulary", "--nonsense"], cwd=ROOT, text=True,
                            capture_output=True)
    found = run(name, "--nonsense")
    assert (found.returncode, found.stdout, found.stderr) == (2, module.stdout, module.stderr)
    assert "nonsense" in found.stderr


def test_an_interrupted_command_ends_as_by_python(program, tmp_path):
    process = subprocess.Popen([*program, "inspect", ROOT / "tests" / "data" / "checkpoints" / "fp16"], text=True, cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    called = pathlib.Path(f"/proc/{process.pid}/cmdline")
    while called.exists() and b"checkpoints_tools.inspect" not in called.read_bytes():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told == "interrupted\n"
