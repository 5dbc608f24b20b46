"""Settings kept beside unfinished work, so that it goes on with the same ones alone."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.files import put_json
from specmq_jax.json_files import read_json


def read_settings(path: pathlib.Path, way_out: str) -> dict[str, Any] | None:
    """The settings in a file; None where there is none.

    Raises:
      UserError: the file is damaged; the message ends in `way_out`.
    """
    try:
        return read_json(path) if path.exists() else None
    except (UserError, RecursionError) as error:
        reason = error if isinstance(error, UserError) else f"{path} is not valid JSON: it is nested too deep"
        raise UserError(f"{reason}; it tells how what lies there was made; {way_out}") from None


def write_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes the file, in a directory that is made where it is missing; errors as in `files.written`."""
    put_json(path, settings, parents=True)


def changes(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, every entry that differs once both are JSON."""
    here = json.loads(json.dumps(here))
    return [f"{key} {before.get(key)!r} there and {here.get(key)!r} here" for key in dict.fromkeys([*before, *here])
            if before.get(key) != here.get(key)]
