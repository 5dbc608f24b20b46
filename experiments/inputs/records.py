"""Files of records as benchmarks are published in: JSON lines, plain or gzip, and parquet."""

import dataclasses
import gzip
import json
import pathlib
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from specmq_jax.errors import UserError

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


def read(path: pathlib.Path) -> Iterator[Record]:
    """The records of a file, whose format its first bytes tell; empty lines are passed over.

    Raises:
      UserError: the file can't be read, a line is no JSON object, a parquet file is damaged or PyArrow missing for it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"the question file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the question file {path} can't be read: {error.strerror}") from None
    if content.startswith(_PARQUET):
        rows = _rows(path)
        yield from (Record(place=f"{path}, row {i + 1}", index=i, values=row) for i, row in enumerate(rows))
        return
    index = 0
    for number, line in enumerate(_text(path, content).split("\n"), start=1):
        if line.strip():
            yield Record(place=f"{path}, line {number}", index=index, values=_object(line, f"{path}, line {number}"))
            index += 1


def _text(path: pathlib.Path, content: bytes) -> str:
    try:
        return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the question file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error):
        raise UserError(f"the question file {path} is a damaged gzip file; download it again") from None


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        check_texts(record, place)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{place}: its JSON is nested too deep to be read; expected a flat object") from None
    except ValueError:  # Python reads no more digits
        raise UserError(f"{place}: it has a number of more than {sys.get_int_max_str_digits()} digits; expected shorter ones"
                        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object; found a {type(record).__name__}")
    return record


def check_texts(record: Any, place: str) -> None:
    """Raises a `UserError` where a text, or an object's key, holds half of a surrogate pair: no file could hold it as it is."""
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{place}: {half} is half of a surrogate pair, which is no text; write the whole character or leave "
                        "it out") from None


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"the question file {path} is a parquet file, which needs PyArrow; pip install pyarrow, or give JSON "
                        "lines") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:  # as Arrow's parts raise them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the question file {path} is a damaged parquet file ({reason[:160]}); download it again") from None
