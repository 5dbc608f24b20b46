"""Counts the GPU cases that a machine without a GPU leaves out, and offers the models that several tests share."""

import pathlib

import jax
import pytest


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _has_gpu():
        return
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and config.option.markexpr == "gpu":
        raise pytest.UsageError(f"{len(needing)} tests were asked for by -m gpu, and JAX sees no GPU here")
    config.hook.pytest_deselected(items=needing)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.stash[_LEFT_OUT] = len(needing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests need a GPU and were not run (python -m pytest -m gpu on one)")


_LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def demo_directory() -> pathlib.Path:
    """The demo model's native checkpoint, downloaded into the user's cache on first use."""
    from checkpoints_tools import demo_model

    return demo_model.prepare()
