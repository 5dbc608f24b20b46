"""Files of records as benchmarks and data sets are published in: JSON lines, plain or gzip, and parquet."""

import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.json_files import parse_json

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line or row.

    Attributes:
      place: file and line, for messages.
      index: counted from 0 over the file's records.
      values: by key.
    """

    place: str
    index: int
    values: Mapping[str, Any]

    def field(self, key: str, kind: str, accepted: bool) -> Any:
        """The value of `key`; where it is missing, or was not `accepted` as a `kind`, a `UserError` says so."""
        if key not in self.values:
            raise UserError(f"{self.place}: {key!r} is missing")
        if not accepted:
            raise UserError(f"{self.place}: {key!r} must be {kind}; found {json.dumps(self.values[key], default=str)[:60]}")
        return self.values[key]

    def text(self, key: str) -> str:
        """The value of `key`, which must be a text."""
        return self.field(key, "a text", is_text(self.values.get(key)))


def is_text(value: Any) -> bool:
    """Whether the value is a text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def read(path: pathlib.Path, what: str = "question file") -> Iterator[Record]:
    """The records of a file, whose format its first bytes tell; empty lines are passed over.

    Args:
      path: of the file.
      what: messages call it.

    Raises:
      UserError: the file can't be read, a line is no JSON object, a parquet file is damaged or PyArrow missing for it.
    """
    content, name = _content(path, what), f"the {what} {path}"
    if content.startswith(_PARQUET):
        rows = _rows(path, name)
        yield from (Record(place=f"{path}, row {i + 1}", index=i, values=row) for i, row in enumerate(rows))
        return
    index = 0
    for number, line in enumerate(_text(content, name).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            values = parse_json(line, f"{place}: it")
            if not isinstance(values, dict):
                raise UserError(f"{place}: expected a JSON object; found a {type(values).__name__}")
            yield Record(place=place, index=index, values=values)
            index += 1


def read_text(path: pathlib.Path, what: str) -> str:
    """A text, plain or gzip; arguments and errors as in `read`."""
    return _text(_content(path, what), f"the {what} {path}")


def _content(path: pathlib.Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"the {what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the {what} {path} can't be read: {error.strerror}") from None


def _text(content: bytes, name: str) -> str:
    try:
        return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error):
        raise UserError(f"{name} is a damaged gzip file; download it again") from None


def _rows(path: pathlib.Path, name: str) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name} is a parquet file, which needs PyArrow; pip install pyarrow, which specmq-jax[train] has, or "
                        "give JSON lines") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:  # as Arrow's parts raise them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} is a damaged parquet file ({reason[:160]}); download it again") from None
