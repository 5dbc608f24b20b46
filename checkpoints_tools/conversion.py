"""Any checkpoint to a native one, weight by weight."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.arguments import progress_bar
from checkpoints_tools.readers import Reader, open_source
from checkpoints_tools.readers.base import sha256
from checkpoints_tools.writers.arrays import contiguous
from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination
from specmq_jax.formats import Dense, DenseFormat, Logical, Quantised, Weight, WeightFormat
from specmq_jax.loading.checkpoint import CheckpointWriter, cached_checkpoints, is_native
from specmq_jax.network.parameters import Formats, is_vector, parameter_shapes

_SMALL_BYTES = 32 << 20
"""Of a file whose contents are looked at; tokenizers have up to 20 MB."""


def convert(source: str | pathlib.Path, destination: str | pathlib.Path, precision: str | None = None,
            head_precision: str | None = None) -> pathlib.Path:
    """Writes `source` as a native checkpoint named `destination`, which it returns.

    Args:
      source: anything `readers.open_source` opens.
      destination: must not exist, or be an empty directory.
      precision: of the layers' linear weights, by round-to-nearest; None keeps the source's.
      head_precision: of lm_head, likewise; None keeps it dense where it is.

    Raises:
      UserError: what the reader finds wrong, an unknown precision, an lm_head that is tied to the embedding, or a
        destination that is taken.
    """
    wanted, head = (formats.get(name) if name else None for name in (precision, head_precision))
    destination = pathlib.Path(destination)
    check_destination(destination)
    reader = open_source(source)
    check_head(reader, head)
    check_changed(reader, wanted, head)
    return write(reader, destination, target_formats(reader.formats, wanted, head))


def check_changed(reader: Reader, wanted: WeightFormat | None, head: WeightFormat | None = None) -> None:
    """Raises a `UserError` where a conversion would copy a native checkpoint."""
    if reader.kind == "native" and wanted in (None, reader.formats.linear) and head in (None, reader.formats.head):
        raise UserError(f"{reader.location} is a native checkpoint of precision {reader.formats.linear.name} already; "
                        "--precision=NAME makes another")


def check_head(reader: Reader, head: WeightFormat | None) -> None:
    """Raises a `UserError` where there is no lm_head to convert."""
    if head and reader.llama.tie_embeddings:
        raise UserError(f"{reader.location} has no lm_head of its own: its embedding table serves as one, and stays dense; "
                        "leave --head_precision out")


def prepare(source: str | pathlib.Path) -> pathlib.Path:
    """The native checkpoint of `source`, converted into the cache directory on first use.

    The name there follows from the source's `fingerprint`, so a changed source is converted again.
    """
    if is_native(source):
        return pathlib.Path(source)
    reader = open_source(source)
    if reader.kind == "native":
        return reader.location
    name = reader.location.resolve().stem if reader.location.is_file() else pathlib.Path(str(source)).resolve().name
    destination = cached_checkpoints() / "converted" / f"{name}-{fingerprint(reader)[:12]}"
    return write_once(reader, destination)


def fingerprint(reader: Reader) -> str:
    """Tells a source from others, and from itself once any file that is read or copied has changed, come or gone.

    It follows from the path, the files' names, sizes and times, and the contents of small files, which an editor may leave as
    long as they were within a tick of the clock.
    """
    key = hashlib.sha256(os.fsencode(reader.location.resolve()))
    for file in sorted(reader.inputs):
        found = file.stat()
        digest = sha256(file) if found.st_size <= _SMALL_BYTES else ""
        key.update(os.fsencode(file) + f" {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {digest}\n".encode())
    return key.hexdigest()


def write_once(reader: Reader, destination: pathlib.Path, *, origin: str | None = None) -> pathlib.Path:
    """`write` in the source's formats, unless `destination` is there already or another process is quicker."""
    if is_native(destination):
        return destination
    try:
        return write(reader, destination, reader.formats, origin=origin)
    except UserError:
        if is_native(destination):
            return destination
        raise


def target_formats(source: Formats, linear: WeightFormat | None, head: WeightFormat | None = None) -> Formats:
    """The formats of a conversion to `linear`.

    A dense precision is that of all parts. Beside quantised linear weights, embedding and lm_head stay as they are, but
    for fp32, which becomes the fp16 of the activations. `head` is lm_head's where it is given.
    """
    if head is not None:
        return dataclasses.replace(target_formats(source, linear), head=head)
    if linear is None:
        return source
    if isinstance(linear, DenseFormat):
        return Formats(linear=linear, head=linear, embed=linear)
    fp32, fp16 = DenseFormat(kind="fp32"), DenseFormat(kind="fp16")
    head, embed = (fp16 if part == fp32 else part for part in (source.head, source.embed))
    return Formats(linear=linear, head=head, embed=embed)


def write(reader: Reader, destination: pathlib.Path, target: Formats, *, origin: str | None = None,
          quantisation: Mapping[str, Any] | None = None) -> pathlib.Path:
    """Writes what `reader` reads, one weight at a time, in the formats `target`; shows progress on stderr.

    `origin` is noted as the source's path where the reader's own is a passing one, `quantisation` as in `CheckpointWriter`.
    """
    shapes = parameter_shapes(reader.llama)
    with (progress_bar() as progress,
          CheckpointWriter(destination, config=reader.config, formats=target, source=origin_of(reader, origin),
                           quantisation=quantisation) as writer):
        task = progress.add_task(f"{reader.location.name} to {target.linear.name}", total=len(shapes))
        reader.save_tokenizer(writer.directory)
        reader.save_rotation(writer.directory)
        for path in shapes:
            writer.add(path, pack(path, reader.read(path), target))
            progress.advance(task)
        writer.add_digests(reader.digests())
    return destination


def origin_of(reader: Reader, origin: str | None = None) -> dict[str, str]:
    """What specmq.json says of the source; `origin` as in `write`."""
    return {"kind": reader.kind, "name": reader.location.name, "path": origin or str(reader.location.absolute())}


def pack(path: str, logical: Logical, target: Formats) -> Weight:
    """The weight for a path of `parameter_shapes` in its format there; values it can't hold are a `UserError`."""
    name, is_table = f"tensor {path}", path == "embed/table"
    if is_table or is_vector(path):
        return _host_values(logical, target.embed if is_table else DenseFormat(kind="fp32"), name)
    weight_format = target.of(path)
    if isinstance(logical, Quantised):
        return jax.device_get(weight_format.pack(logical, name=name))
    if isinstance(weight_format, DenseFormat):
        return Dense(_host_values(logical, weight_format, name))
    weight_format.range.check(formats.peak(logical), name)
    return jax.device_get(_pack_values(logical, weight_format))


def _host_values(logical: Float[np.ndarray, "..."], dense: DenseFormat, name: str) -> Float[np.ndarray, "..."]:
    values = np.asarray(logical)
    dense.range.check(formats.peak(values), name)
    return contiguous(values, dense.dtype)


@functools.partial(jax.jit, static_argnames="target")
def _pack_values(values: Float[Array, "K N"], target: WeightFormat) -> Weight:
    return target.pack(values)
