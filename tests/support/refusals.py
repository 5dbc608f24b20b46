"""What is refused in one line, and how."""

import pytest

from checkpoints_tools.conversion import convert
from specmq_jax.errors import UserError


def refuse(tmp_path, source, *parts):
    """Converting must fail with one line that holds all `parts`, and leave no trace."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "made")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def truncate(path, count):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - count)
