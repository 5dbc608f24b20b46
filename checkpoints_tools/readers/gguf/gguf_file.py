"""A GGUF file's header, checked before anything that it promises is believed.

The `gguf` library parses it. It trusts lengths: an array that says it has 2**60 entries is read for ever, and a product of
sizes beyond 64 bits comes out small. Layout: ggml's `docs/gguf.md`.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gguf
import numpy as np

from specmq_jax import entries
from specmq_jax.errors import UserError

_MOST_ENTRIES = 1 << 24
"""Of one array in the metadata; the largest vocabularies have a few hundred thousand tokens and merges."""
_MOST_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Metadata entries by key, each of the kind that is asked for.

    Attributes:
      value: value(key, default) is an entry's contents, or `default`.
      where: the file, as messages call it.
    """

    value: Callable[..., Any]
    where: str

    def integer(self, key: str, default: int | None = None, *, low: int = 1, required: bool = False) -> Any:
        """An integer of at least `low`; raises a `UserError` for anything else."""
        found = self.value(key)
        if found is None and not required:
            return default
        return entries.integer(self.where, key, found, low=low)

    def number(self, key: str, default: float | None = None, *, zero: bool = False, required: bool = False) -> Any:
        """A positive number; raises a `UserError` for anything else."""
        found = self.value(key)
        if found is None and not required:
            return default
        return entries.number(self.where, key, found, zero=zero)

    def text(self, key: str, default: str | None = None) -> Any:
        """A text; raises a `UserError` for anything else."""
        found = self.value(key)
        if not isinstance(found, str | None):
            raise UserError(f"{self.where} needs a text {key!r}; found {entries.shown(found)}")
        return default if found is None else found

    def flag(self, key: str, default: bool) -> bool:
        """True or false; raises a `UserError` for anything else."""
        found = self.value(key)
        return default if found is None else entries.flag(self.where, key, found)

    def items(self, key: str, kind: type | tuple[type, ...], word: str, length: int | None = None) -> list[Any] | None:
        """A list of `kind`, described by `word`, of `length` if that is given; None if the key is absent.

        Raises:
          UserError: something else, or another length.
        """
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in found):
            raise UserError(f"{self.where} needs a list of {word} {key!r}; found {entries.shown(found)}")
        if length is not None and len(found) != length:
            raise UserError(f"{self.where} has {len(found)} {word} in {key}; expected {length}, one a token")
        return found


def open_file(path: pathlib.Path) -> gguf.GGUFReader:
    """Parses a file's header and checks that its tensors lie in it, each for itself.

    Raises:
      UserError: a truncated or damaged file, one of the other byte order, or an unknown type of metadata or tensor.
    """
    with path.open("rb") as beginning:
        version = int.from_bytes(beginning.read(8)[4:], "little")
    if version and not version & 0xFFFF:
        raise UserError(f"{path} is big-endian; convert it with gguf-convert-endian")
    try:
        return _CheckedReader(path)
    except UserError as error:
        raise UserError(f"{path} is truncated or damaged: it has {path.stat().st_size} bytes, {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise UserError(f"{path} is truncated or damaged: it has {path.stat().st_size} bytes and its GGUF header can't be "
                        f"read ({entries.shown(reason)})") from None


class _CheckedReader(gguf.GGUFReader):
    """Refuses what lies outside the file before the library looks there."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise UserError(f"expected at least {end}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """As the library's, which takes seconds for a vocabulary's arrays: it makes several arrays of every entry."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, int(raw_type))
        kind, length = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        if kind == gguf.GGUFValueType.ARRAY:
            raise UserError("and its metadata holds an array of arrays, which no known key has")
        if length > _MOST_ENTRIES:
            raise UserError(f"and its metadata holds an array of {length} entries; at most {_MOST_ENTRIES} are read")
        types, start = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind)], orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            texts, end = self._get_texts(start, length)
            return end - orig_offs, texts, list(range(length)), types
        values = self._get(start, self.gguf_scalar_to_np[types[1]], length)
        return 12 + values.nbytes, [values], [0], types

    def _get_texts(self, start: int, length: int) -> tuple[list[np.ndarray], int]:
        """The bytes of `length` texts that follow each other, and where they end."""
        data, view, end, texts = np.asarray(self.data), memoryview(self.data), int(start), []
        for _ in range(length):
            begin = end + 8
            end = begin + int.from_bytes(view[end:begin], "little")
            if end > len(view):
                raise UserError(f"expected at least {end}")
            texts.append(data[begin:end])
        return texts, end

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        dimensions = orig_offs + 8 + int(self._get(orig_offs, np.uint64)[0])
        count = self._get(dimensions, np.uint32)[0]
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise UserError(f"and a tensor has {count} dimensions; expected 1 to {_MOST_DIMENSIONS}")
        return super()._get_tensor_info_field(orig_offs)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        spans = sorted(_span(field, int(start_offs)) for field in fields)
        for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise UserError(f"and its tensors {name} and {other} overlap")
        expected = max((end for _, end, _ in spans), default=0)
        if len(self.data) < expected:
            raise UserError(f"expected {expected}")
        super()._build_tensors(start_offs, fields)


def _span(field: Any, data_start: int) -> tuple[int, int, str]:
    """Where a tensor begins and ends in the file, and its name."""
    _, raw_name, _, raw_sizes, raw_type, offset = field.parts
    name, sizes = str(bytes(raw_name), "utf-8"), [int(size) for size in raw_sizes]
    if not name.isprintable():
        raise UserError(f"and a tensor has the name {entries.shown(name)}")
    types: Sequence[int] = [kind.value for kind in gguf.GGMLQuantizationType]
    if raw_type[0] not in types:
        raise UserError(f"and its tensor {name} has the unknown type {raw_type[0]}")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(raw_type[0])]
    if sizes[0] % block:
        raise UserError(f"and its tensor {name} has rows of {sizes[0]} values, which blocks of {block} do not fill")
    start = data_start + int(offset[0])
    return start, start + math.prod(sizes) * size // block, name
