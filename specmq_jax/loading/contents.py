"""Digests of what models hold: they tell a model from another in its place, and know it again in another place."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from specmq_jax.errors import UserError
from specmq_jax.loading.checkpoint import METADATA_FILE, read_metadata
from specmq_jax.tokenizer_files import TOKENIZER_FILES

_BLOCK_BYTES = 8 << 20
_BESIDE_WEIGHTS = ("config.json", *TOKENIZER_FILES)
"""Files of a checkpoint that decide what a model computes, how it is asked and where its answers end."""
_PICKLED = (".bin", ".pt", ".pth")


def checkpoint_digest(directory: str | pathlib.Path) -> str:
    """The digest of a native checkpoint's weights, configuration and tokenizer, 16 hexadecimal digits.

    The weights' part comes from specmq.json, whose checksums loading compares with the files. A copy has its original's
    digest, and so has a second conversion of one source.

    Raises:
      UserError: a damaged specmq.json, weights of other sizes than it tells, or a file that can't be read.
    """
    directory = pathlib.Path(directory)
    metadata = read_metadata(directory)
    _check_sizes(directory, metadata["files"])
    files = [directory / name for name in _BESIDE_WEIGHTS]
    files += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    beside = _by_name(filter(pathlib.Path.is_file, files))
    return json_digest([metadata["formats"], metadata.get("content", metadata["files"]), beside])


def head_digest(directory: str | pathlib.Path) -> str:
    """The digest of an EAGLE head's files, 16 hexadecimal digits; all their bytes are read.

    Raises:
      UserError: there is no head, or a file can't be read.
    """
    directory = pathlib.Path(directory)
    try:
        files = sorted(filter(pathlib.Path.is_file, directory.iterdir()))
    except OSError as error:
        raise UserError(f"the head {directory} can't be read: {error.strerror}; give its directory") from None
    weights = [file for file in files if file.suffix == ".safetensors"] or [file for file in files if file.suffix in _PICKLED]
    if not weights:
        raise UserError(f"{directory} holds neither model.safetensors nor pytorch_model.bin")
    return json_digest(_by_name([*weights, *(file for file in files if file.suffix == ".json")]))


def file_digest(path: pathlib.Path) -> str:
    """The digest of a file's bytes, 16 hexadecimal digits: SHA-256 over the SHA-256 of its blocks, which are read side by side.

    Raises:
      UserError: the file can't be read.
    """
    try:
        with path.open("rb") as file, concurrent.futures.ThreadPoolExecutor() as pool:
            starts = range(0, os.fstat(file.fileno()).st_size, _BLOCK_BYTES)
            blocks = pool.map(lambda start: hashlib.sha256(os.pread(file.fileno(), _BLOCK_BYTES, start)).digest(), starts)
            return hashlib.sha256(b"".join(blocks)).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def json_digest(value: object) -> str:
    """The digest of JSON values, 16 hexadecimal digits; the order of an object's keys doesn't matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _check_sizes(directory: pathlib.Path, expected: Mapping[str, Any]) -> None:
    for name, entry in expected.items():
        try:
            size, found = int(entry[0]), (directory / name).stat().st_size
        except OSError as error:
            raise UserError(f"{directory / name} can't be read: {error.strerror}; convert the model again") from None
        except (TypeError, ValueError, LookupError):
            raise UserError(f"{directory / METADATA_FILE} tells no size of {name}; convert the model again") from None
        if found != size:
            raise UserError(f"{directory / name} has {found} bytes, expected {size}; convert the model again")


def _by_name(files: Iterable[pathlib.Path]) -> dict[str, str]:
    return {file.name: file_digest(file) for file in files}
