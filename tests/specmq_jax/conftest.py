"""A tiny model whose low-bit copy drafts well enough for some drafts to be accepted and some not."""

import pytest
from fakes import tiny_config

import specmq_jax as sm


@pytest.fixture(scope="session")
def tiny() -> sm.Model:
    return sm.random_model(tiny_config(), "fp32", seed=1)


@pytest.fixture(scope="session")
def tiny_draft(tiny: sm.Model) -> sm.Model:
    return tiny.with_precision("w4a16-g32")
