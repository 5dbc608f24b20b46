"""The native checkpoint: a directory with config.json, tokenizer files, specmq.json and an Orbax tree in shards."""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import pathlib
import warnings
import zlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from specmq_jax.commands.version import version
from specmq_jax.errors import UserError
from specmq_jax.files import cache_directory, put_json, staged
from specmq_jax.formats import Weight
from specmq_jax.json_files import read_json
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.parameters import Formats, parameter_shapes

METADATA_FILE = "specmq.json"
FORMAT_VERSION = 4
SHARD_BYTES = 128 << 20
_BLOCK_BYTES = 8 << 20

Params = Any


def is_native(directory: str | pathlib.Path) -> bool:
    """Whether `directory` is a native checkpoint, sound or not."""
    return (pathlib.Path(directory) / METADATA_FILE).is_file()


def cached_checkpoints() -> pathlib.Path:
    """Where conversions on first use are kept, apart from those that a program of another format version made."""
    return cache_directory() / f"checkpoints-{FORMAT_VERSION}"


def read_metadata(directory: str | pathlib.Path) -> dict[str, Any]:
    """Parses specmq.json: format_version, tool_version, formats, source, quantisation, sha256 of the inputs, content (a digest
    of all weights, whatever files hold them), shards, files.

    Raises:
      UserError: the file is absent, malformed, or of a later version than this program reads.
    """
    path = pathlib.Path(directory) / METADATA_FILE
    if not path.exists():
        raise UserError(f"{directory} is not a native checkpoint: it has no {METADATA_FILE}; make one with "
                        "python -m checkpoints_tools.convert SRC DST")
    metadata = read_json(path)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {metadata.get('format_version')!r}; this program reads "
                        f"{FORMAT_VERSION}; convert the model again")
    for key, kind in (("formats", dict), ("shards", int), ("files", dict)):
        if not isinstance(metadata.get(key), kind):
            raise UserError(f"{path} lacks {key!r}; convert the model again")
    for part in ("linear", "head", "embed"):
        if not isinstance(metadata["formats"].get(part), str):
            raise UserError(f"{path} lacks the precision of {part!r}; convert the model again")
    return metadata


class CheckpointReader:
    """Reads a native checkpoint's tensors, all or one at a time.

    Opening checks every file's size and checksum, and every tensor's shape and dtype against config.json.

    Raises:
      UserError: a file or tensor that is missing, truncated, damaged or of another shape.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        self.metadata = read_metadata(self.directory)
        self.config = LlamaConfig.from_directory(self.directory)
        self.formats = Formats.named(self.metadata["formats"])
        self.shapes = parameter_shapes(self.config)
        self._checkpointer = _checkpointer()
        self._check_files()
        stored = self._stored_leaves()
        self._shard_of = {name: shard for name, (shard, _) in stored.items()}
        self._check_leaves({name: leaf for name, (_, leaf) in stored.items()})

    def restore(self, device: jax.Device | None = None) -> Params:
        """All parameters as Flax variables on `device`, by default JAX's default device."""
        tree: dict[str, Any] = {}
        for path, weight in self.weights(device):
            _put(tree, path, weight)
        return {"params": tree}

    def weights(self, device: jax.Device | None = None) -> Iterator[tuple[str, Weight]]:
        """Each path of `parameter_shapes` with its weight on `device`, read shard by shard: whoever drops the weights as
        they come holds one shard's at a time, `SHARD_BYTES` and one weight more at the most."""
        by_shard: dict[pathlib.Path, list[str]] = {}
        for path, shape in self.shapes.items():
            name, _ = next(_named_leaves(path, self.formats.abstract(path, shape)))
            by_shard.setdefault(self._shard_of[name], []).append(path)
        for paths in by_shard.values():
            found = self._read(paths, device)
            for path in paths:
                yield path, found.pop(path)

    def read(self, path: str, device: jax.Device | None = None) -> Weight:
        """The weight at one path of `parameter_shapes`."""
        return self._read([path], device)[path]

    def _read(self, paths: list[str], device: jax.Device | None) -> dict[str, Weight]:
        abstract = {path: self.formats.abstract(path, self.shapes[path]) for path in paths}
        wanted = {name: leaf for path in paths for name, leaf in _named_leaves(path, abstract[path])}
        sharding = jax.sharding.SingleDeviceSharding(device or _default_device())
        leaves: dict[str, jax.Array] = {}
        for shard in sorted({self._shard_of[name] for name in wanted}):
            names = [name for name in wanted if self._shard_of[name] == shard]
            leaves |= self._restore_shard(shard, {name: wanted[name] for name in names}, sharding)
        result = {}
        for path in paths:
            names = [name for name, _ in _named_leaves(path, abstract[path])]
            result[path] = jax.tree.unflatten(jax.tree.structure(abstract[path]), [leaves[name] for name in names])
        return result

    def _restore_shard(self, shard: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct],
                       sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
        item: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for name, leaf in wanted.items():
            _put(item, name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
            _put(arguments, name, ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding,
                                                       global_shape=leaf.shape, dtype=leaf.dtype))
        with _reported(shard), quiet():
            tree = self._checkpointer.restore(shard.absolute(), args=ocp.args.PyTreeRestore(
                item, restore_args=arguments, partial_restore=True))
        return dict(_named_leaves("", tree))

    def _check_files(self) -> None:
        expected = self.metadata["files"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for _ in pool.map(self._check_file, expected, expected.values()):
                pass

    def _check_file(self, name: str, expected: list[int]) -> None:
        path, (size, checksum) = self.directory / name, expected
        try:
            found = path.stat().st_size
            if found != size:
                raise UserError(f"{path} has {found} bytes, expected {size}: the checkpoint is truncated or damaged; "
                                "convert the model again")
            if _checksum(path) != checksum:
                raise UserError(f"{path} is damaged: its checksum differs from specmq.json's; convert the model again")
        except FileNotFoundError:
            raise UserError(f"{path} is missing; convert the model again") from None
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None

    def _stored_leaves(self) -> dict[str, tuple[pathlib.Path, Any]]:
        stored: dict[str, tuple[pathlib.Path, Any]] = {}
        for i in range(self.metadata["shards"]):
            shard = self.directory / "weights" / f"shard_{i:03}"
            if not shard.is_dir():
                raise UserError(f"{shard} is missing; convert the model again")
            with _reported(shard), quiet():
                tree = self._checkpointer.metadata(shard.absolute()).item_metadata.tree
            stored |= {name: (shard, leaf) for name, leaf in _named_leaves("", tree)}
        return stored

    def _check_leaves(self, stored: Mapping[str, Any]) -> None:
        for path, shape in self.shapes.items():
            for name, expected in _named_leaves(path, self.formats.abstract(path, shape)):
                if name not in stored:
                    raise UserError(f"{self.directory} lacks the tensor {name}, which config.json asks for; convert the "
                                    "model again")
                found = stored[name]
                if tuple(found.shape) != expected.shape or np.dtype(found.dtype) != expected.dtype:
                    raise UserError(f"tensor {name} of {self.directory} is {found.dtype}{list(found.shape)}; "
                                    f"config.json and specmq.json expect {expected.dtype}{list(expected.shape)}")


def restore(directory: str | pathlib.Path, *, device: jax.Device | None = None) -> Params:
    """Restores a native checkpoint's parameters straight to `device`; see `CheckpointReader` for the errors."""
    return CheckpointReader(directory).restore(device)


class CheckpointWriter:
    """Writes a native checkpoint one weight at a time; a context manager.

    Everything is written beside the destination and renamed when the context ends well; when it ends with an error or
    Ctrl-C, nothing is left behind, as in `files.staged`.

    Attributes:
      directory: the temporary directory; tokenizer files may be put there.
    """

    directory: pathlib.Path

    def __init__(self, destination: str | pathlib.Path, *, config: Mapping[str, Any], formats: Formats,
                 source: Mapping[str, Any], quantisation: Mapping[str, Any] | None = None, shard_bytes: int = SHARD_BYTES):
        """
        Args:
          destination: must not exist, or be an empty directory.
          config: contents of config.json.
          formats: that the weights given to `add` are in.
          source: what the model was made from, for specmq.json.
          quantisation: how its weights were quantised, for specmq.json; None where nothing is to be said.
          shard_bytes: pending weights are written out once they pass this many bytes.
        """
        self.destination = pathlib.Path(destination)
        self._config, self._formats, self._source = dict(config), formats, dict(source)
        self._quantisation = quantisation
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Any] = {}
        self._pending_bytes = 0
        self._shards = 0
        self._sha256: dict[str, str] = {}
        self._staged = contextlib.ExitStack()
        self._contents: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.directory = self._staged.enter_context(staged(self.destination))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        with self._staged:
            if error is not None:
                raise error  # into the context that removes the directory
            self._finish()

    def add(self, path: str, weight: Weight) -> None:
        """Takes the weight for a path of `parameter_shapes`, in the format that the writer was given."""
        for name, leaf in _named_leaves(path, weight):
            array = np.asarray(leaf)
            self._contents[name] = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            _put(self._pending, name, array)
            self._pending_bytes += array.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def add_digests(self, digests: Mapping[str, str]) -> None:
        """Records the SHA-256 of input files by name."""
        self._sha256 |= digests

    def _flush(self) -> None:
        shard = self.directory / "weights" / f"shard_{self._shards:03}"
        shard.parent.mkdir(exist_ok=True)
        # in a thread, which no interrupt reaches: it has ended before the directory that it writes into is removed
        with quiet(), concurrent.futures.ThreadPoolExecutor(1) as saving:
            saving.submit(_checkpointer().save, shard, args=ocp.args.PyTreeSave(self._pending)).result()
        self._pending, self._pending_bytes = {}, 0
        self._shards += 1

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        files = sorted(path for path in (self.directory / "weights").rglob("*") if path.is_file())
        metadata = {
            "format_version": FORMAT_VERSION,
            "tool_version": version(),
            "formats": self._formats.names,
            "source": self._source,
            **({"quantisation": self._quantisation} if self._quantisation else {}),
            "sha256": self._sha256,
            "content": hashlib.sha256(json.dumps(self._contents, sort_keys=True).encode()).hexdigest(),
            "shards": self._shards,
            "files": {path.relative_to(self.directory).as_posix(): [path.stat().st_size, _checksum(path)]
                      for path in files},
        }
        config = {key: value for key, value in self._config.items() if key != "quantization_config"}
        put_json(self.directory / "config.json", config)
        put_json(self.directory / METADATA_FILE, metadata)


def _named_leaves(path: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves with names such as layers_0/attention/qkv/w/packed, whether nodes are dicts or format dataclasses."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in keys]
        yield "/".join([path, *parts] if path else parts), leaf


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _checkpointer() -> ocp.Checkpointer:
    # weights hardly shrink (by 9 % in fp16), and compressing takes another copy in memory and most of the time
    with quiet():
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _checksum(path: pathlib.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _default_device() -> jax.Device:
    device = jax.config.values["jax_default_device"]
    return device if isinstance(device, jax.Device) else jax.local_devices()[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's warnings and log lines off the terminal; of errors it also raises an exception."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reported(shard: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise over an unreadable shard into one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{shard} can't be read ({lines[0][:160]}); convert the model again") from None
