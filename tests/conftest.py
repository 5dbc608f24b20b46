"""Counts the cases that a machine without a GPU or without PyTorch leaves out, and offers the models that several tests
share."""

import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Callable, Generator
from typing import NamedTuple

import jax
import pytest


class Need(NamedTuple):
    """What the tests of a marker need, and what to say where it is missing."""

    is_met: Callable[[], bool]
    missing: str
    left_out: str


NEEDS = {
    "gpu": Need(lambda: jax.default_backend() == "gpu", "JAX sees no GPU here",
                "need a GPU and were not run (python -m pytest -m gpu on one)"),
    "cuda": Need(lambda: any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
                 "JAX's CUDA plugin is not installed",
                 "need JAX's CUDA plugin, though no GPU, and were not run (pip install 'specmq-jax[cuda13]')"),
    "torch": Need(lambda: importlib.util.find_spec("torch") is not None, "PyTorch is not installed",
                  "need PyTorch and were not run (pip install 'specmq-jax[torch]')"),
    "shared": Need((pathlib.Path(__file__).parents[2] / "shared" / "checkpoints").is_dir,
                   "there is no ../shared/checkpoints beside the repository",
                   "need the checkpoints of real toolkits in ../shared and were not run"),
}


SLOW = "take long and were not run (python -m pytest -m slow)"
# several processes share a GPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="Run the I-th of N parts of the chosen tests: -m gpu --shard=2/3.")


def _shard(config: pytest.Config) -> tuple[int, int]:
    """Which part of how many, counted from 0."""
    given = config.option.shard or "1/1"
    number, _, count = given.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--shard={given}: expected I/N with I from 1 to N")
    return int(number) - 1, int(count)


def pytest_configure(config: pytest.Config) -> None:
    _shard(config)
    _compile_once(config)
    need = NEEDS.get(config.option.markexpr)
    if need and not need.is_met():
        raise pytest.UsageError(f"-m {config.option.markexpr} asks for tests that can't run: {need.missing}")


def _compile_once(config: pytest.Config) -> None:
    """Tests and the commands that they start share what they compile, unless JAX was told of a place for it.

    JAX writes there without a lock, so each process that runs a share of the tests has a place of its own.
    """
    if config.getoption("dist", "no") != "no":  # this process runs none
        return
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    place = tempfile.TemporaryDirectory(prefix="specmq-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(place.cleanup)
    settings = {"jax_compilation_cache_dir": place.name, "jax_persistent_cache_min_compile_time_secs": 0,
                "jax_persistent_cache_min_entry_size_bytes": -1}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    left_out = {}
    for marker, need in NEEDS.items():
        needing = [item for item in items if item.get_closest_marker(marker)]
        if not needing or need.is_met():
            continue
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]
        left_out[marker] = len(needing)
    if config.option.markexpr == "not slow":  # what setup.cfg says; pytest drops them behind this
        if slow := sum(item.get_closest_marker("slow") is not None for item in items):
            left_out["slow"] = slow
    config.stash[_LEFT_OUT] = left_out
    yield  # pytest itself drops tests by -m and -k
    number, count = _shard(config)
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number])
    items[:] = items[number::count]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of a process that runs a share of the tests
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    del error
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})  # every process sees all tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for marker, count in config.stash.get(_LEFT_OUT, {}).items():
        why = SLOW if marker == "slow" else NEEDS[marker].left_out
        terminalreporter.write_line(f"{count} tests {why}")


@pytest.fixture(scope="session")
def demo_directory() -> pathlib.Path:
    """The demo model's native checkpoint, downloaded into the user's cache on first use."""
    from checkpoints_tools import demo_model

    return demo_model.prepare()
