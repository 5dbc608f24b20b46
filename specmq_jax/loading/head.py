"""An EAGLE head ready to draft for a target, and its making from an official head's file."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.loading import head_checks, head_entries
from specmq_jax.loading.head_file import HeadFiles, check_types
from specmq_jax.loading.head_layout import check_layout
from specmq_jax.loading.head_parameters import borrowed, head_parameters
from specmq_jax.loading.head_tensors import LM_HEAD
from specmq_jax.loading.model import Model
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.eagle import EagleConfig, EagleHead, eagle_config, eagle_version


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Head:
    """What `load_head` returns.

    Attributes:
      config: sizes.
      module: the functional module.
      params: {"head": Flax variables, "ids": i32[V_draft] target id of each draft id, or None where they are equal}.
        Tables that the head's file lacks are the target's own arrays.
      capture: target layers whose entering streams it reads; empty for the final states.
    """

    config: EagleConfig
    module: EagleHead
    params: Any
    capture: tuple[int, ...]

    def __repr__(self) -> str:
        layer = self.config.layer
        return (f"Head(eagle{self.config.version}, {layer.num_layers} {'layer' if layer.num_layers == 1 else 'layers'} of "
                f"{layer.hidden_size}, {layer.vocab_size} tokens, {self.module.format.name})")

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that drafting one level reads: all but the embedding."""
        tree = self.params["head"]["params"]
        return sum(leaf.nbytes for name, part in tree.items() if name != "embed" for leaf in jax.tree.leaves(part))

    def new_cache(self, max_len: int, *, limit: int | None = None) -> KVCache:
        """An empty cache of `max_len` rows, meant for `limit` tokens (default: as many)."""
        return KVCache.create(self.config.layer, max_len, self.module.format.dtype, limit=limit)

    def check(self, target: LlamaConfig) -> None:
        """Raises a `UserError` where the head was made for a target of other sizes."""
        _check_target(self.config, self.capture, target)


def load_head(directory: str | pathlib.Path, target: Model, *, precision: str | None = None) -> Head:
    """Loads an official EAGLE-1, -2 or -3 head for a target.

    Args:
      directory: config.json with model.safetensors, or pytorch_model.bin (needs the extra `torch`).
      target: whose embedding and lm_head are used where the file has none.
      precision: of the head's weights; by default dense in the target's activation dtype.

    Raises:
      UserError: a missing or damaged file, a head of another layout or with parts that the official network lacks, one made
        for another target, values that are not finite or beyond the range of their format.
    """
    files = _opened(directory)
    head = _described(files, target, precision)
    directory, tensors = files.directory, files.read()
    head_checks.check_biases(directory, tensors, head.config)
    head_checks.check_draft_ids(directory, tensors, target.config.vocab_size)
    params = head_parameters(directory, tensors, head.module, target)
    head_checks.check_basis(directory, tensors, head.config, target)
    ids = jnp.asarray(head_checks.draft_ids(tensors), jnp.int32) if "d2t" in tensors else None
    return dataclasses.replace(head, params={"head": {"params": params}, "ids": ids})


def outline_head(directory: str | pathlib.Path, target: Model, *, precision: str | None = None) -> Head:
    """What `load_head` would make, from the same arguments, with `jax.ShapeDtypeStruct`s in `params`; parts of the target
    are the very ones that it holds.

    Raises:
      UserError: as `load_head`, but for what the tensors' values tell.
    """
    files = _opened(directory)
    head, headers = _described(files, target, precision), files.headers

    def parameters() -> Any:
        states = jnp.zeros((1, head.config.feature_size))
        return head.module.init(jax.random.key(0), jnp.zeros(1, jnp.int32), states, head.new_cache(128),
                                method="everything")["params"]

    ids = jax.ShapeDtypeStruct(headers["d2t"].shape, jnp.int32) if "d2t" in headers else None
    return dataclasses.replace(head, params={
        "head": {"params": jax.eval_shape(parameters) | borrowed(headers, head.config, target)}, "ids": ids})


def _described(files: HeadFiles, target: Model, precision: str | None) -> Head:
    """A head without its parameters; whatever is wrong with its config.json or the headers is a `UserError`."""
    directory, headers = files.directory, files.headers
    if not isinstance(target, Model):
        raise UserError(f"the target must be what specmq_jax.load returns; found a {type(target).__name__}")
    settings, version = _read_kind(files)
    head_entries.check_entries(directory, settings, headers, version)
    head_entries.check_widths(directory, settings, target.config.hidden_size)
    config = eagle_config(settings, {name: header.shape for name, header in headers.items()}, target.config)
    config = dataclasses.replace(config, streams=head_entries.named_streams(directory, settings, version))
    capture = config.capture(target.config.num_layers)
    _check_target(config, capture, target.config)
    head_entries.check_other_streams(directory, settings, capture)
    head_checks.check_vocabulary(directory, settings, headers, target)
    head_checks.check_tied(directory, settings, headers, config)
    head_checks.check_tensors(directory, settings, headers, config)
    dense = formats.dense_format(target.module.format.dtype)
    linear = formats.get(precision) if precision else dense
    head_format = dense if LM_HEAD in headers else target.module.head_format
    module = EagleHead(config, linear, head_format, target.module.embed_format)
    return Head(config=config, module=module, capture=capture, params=None)


def head_version(directory: str | pathlib.Path) -> int:
    """2 or 3, what kind of EAGLE head a directory holds (EAGLE-1 heads are of kind 2); errors as in `load_head`."""
    return _read_kind(_opened(directory))[1]


def _opened(directory: str | pathlib.Path) -> HeadFiles:
    if not isinstance(directory, str | pathlib.Path):
        raise UserError(f"a head is loaded from the path of its directory; found a {type(directory).__name__}")
    return HeadFiles.open(pathlib.Path(directory))


def _read_kind(files: HeadFiles) -> tuple[dict[str, Any], int]:
    """A head's config.json, and its version."""
    settings = read_json(files.directory / "config.json")
    check_layout(files.directory, settings, files.headers)
    check_types(files.directory, files.headers)
    return settings, eagle_version(files.headers)


def _check_target(config: EagleConfig, capture: tuple[int, ...], target: LlamaConfig) -> None:
    if not all(0 <= layer < target.num_layers for layer in capture):
        least = max(capture) + 1 if config.streams else 4
        raise UserError(f"an EAGLE-3 head reads the target's layers {capture}; this target has {target.num_layers}, at "
                        f"least {least} are needed")
    width = target.hidden_size * max(1, len(capture))
    if config.feature_size != width or config.vocab_size != target.vocab_size:
        raise UserError(f"the EAGLE head reads states of width {config.feature_size} over a vocabulary of "
                        f"{config.vocab_size}; this target gives {width} over {target.vocab_size}")
