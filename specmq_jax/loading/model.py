"""A model ready to run: configuration, Flax module, parameters on the device."""

import dataclasses
import functools
import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int32

from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.formats import AnyArray, Dense, DenseFormat, Weight, WeightFormat
from specmq_jax.loading import checkpoint
from specmq_jax.loading.memory import check_room, size, tree_bytes
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.llama import Llama
from specmq_jax.network.parameters import Formats, is_vector, parameter_shapes
from specmq_jax.words import count

Params = Any
Peaks = dict[str, tuple[Float[Array, ""], WeightFormat]]
"""The largest magnitude of a weight that was packed, still on the device, and its format."""
_DIGEST = re.compile("-[0-9a-f]{12}$")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Model:
    """What `load` returns.

    Attributes:
      config: sizes.
      module: the functional module; its formats say how `params` are stored on this device.
      params: Flax variables.
      precision: the name of the linear weights' format, which on a CPU differs from `module.format`: there weights are
        expanded to f32 once.
      directory: the native checkpoint they came from, None for random weights.
    """

    config: LlamaConfig
    module: Llama
    params: Params
    precision: str
    directory: pathlib.Path | None = None

    def __repr__(self) -> str:
        # a converted checkpoint's directory in the cache has a digest behind its name
        config, name = self.config, _DIGEST.sub("", self.directory.name) if self.directory else "random weights"
        return (f"{type(self).__name__}({name} at {self.precision}, {count(config.num_layers, 'layer')} of "
                f"{config.hidden_size}, {count(config.vocab_size, 'token')}, {size(tree_bytes(self.params))})")

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads on this device: all but an untied embedding table."""
        skipped = 0 if self.config.tie_embeddings else self.params["params"]["embed"]["table"].nbytes
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) - skipped

    def new_cache(self, max_len: int, *, limit: int | None = None) -> KVCache:
        """An empty cache of `max_len` rows in the layers' dtype, meant for `limit` tokens (default: as many)."""
        return KVCache.create(self.config, max_len, self.module.format.dtype, limit=limit)

    def with_precision(self, precision: str) -> Self:
        """The same weights at another precision, quantised by round-to-nearest; embedding and lm_head are shared.

        Raises:
          UserError: an unknown precision, or values outside its range.
        """
        if precision == self.precision:
            return self
        linear = formats.get(precision)
        expanded = self.module.format.name != self.precision  # and stays so
        return self._held(linear, dataclasses.replace(self._formats, linear=formats.expanded(linear) if expanded else linear))

    def dense(self) -> Self:
        """The same values as dense weights in the activations' dtype, multiplied by the kernels' references: what can be
        differentiated, and what rows enough to fill a device are multiplied by.

        Raises:
          UserError: values outside that dtype's range.
        """
        dense = formats.dense_format(self.module.format.dtype)
        made = self._held(dense, dataclasses.replace(self._formats, linear=dense, head=dense))
        return dataclasses.replace(made, module=made.module.clone(implementation="reference"))

    def _held(self, linear: WeightFormat, held: Formats) -> Self:
        """The same weights in the formats `held`; a layer's are rounded to what `linear` can hold."""
        current, shapes = self._formats, parameter_shapes(self.config)
        weights = traverse_util.flatten_dict(self.params["params"], sep="/")
        peaks: Peaks = {}
        made = {path: self._repacked(path, weight, shapes[path], current, linear, held, peaks)
                for path, weight in weights.items()}
        _check_peaks(peaks)
        return dataclasses.replace(self, module=_module(self.config, held), params=_variables(made), precision=linear.name)

    @property
    def _formats(self) -> Formats:
        return Formats(linear=self.module.format, head=self.module.head_format, embed=self.module.embed_format)

    @staticmethod
    def _repacked(path: str, weight: Weight, shape: tuple[int, ...], current: Formats, linear: WeightFormat, held: Formats,
                  peaks: Peaks) -> Weight:
        """The weight at a path of `parameter_shapes`, packed as `_repackings` says; notes in `peaks` what went into it."""
        for before, after in _repackings(path, current, linear, held):
            if path == "embed/table":
                weight = weight.astype(after.dtype)
            elif after == formats.expanded(before):
                weight = _expand(weight, before, shape)
            else:
                weight, largest = _repack(weight, before, after, shape)
                peaks[path] = largest, after
        return weight


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Outline(Model):
    """A model that is not loaded: `params` holds `jax.ShapeDtypeStruct`s.

    Attributes:
      making_bytes: device memory that loading, or quantising, takes at the most beside the weights that come of it.
    """

    making_bytes: int = 0

    @classmethod
    def of(cls, config: LlamaConfig, held: Formats) -> Self:
        """The outline of a model whose parts are in the formats `held`."""
        weights = {path: held.abstract(path, shape) for path, shape in parameter_shapes(config).items()}
        return cls(config=config, module=_module(config, held), params=_variables(weights), precision=held.linear.name)

    def with_precision(self, precision: str) -> Self:
        made = super().with_precision(precision)
        packed = [shape for path, shape in parameter_shapes(self.config).items() if _is_linear(path)]
        return made if made is self else dataclasses.replace(made, making_bytes=_packing_bytes(packed))

    @staticmethod
    def _repacked(path: str, weight: Weight, shape: tuple[int, ...], current: Formats, linear: WeightFormat, held: Formats,
                  peaks: Peaks) -> Weight:
        del current, linear, peaks
        return held.abstract(path, shape) if _is_linear(path) else weight


def outline(source: str | pathlib.Path, precision: str | None = None, *, expand: bool | None = None) -> Outline:
    """What `load` would make, from the same arguments: its memory and its mistakes are known before anything is loaded.

    A foreign source is converted, one weight at a time.

    Raises:
      UserError: nothing readable there, or an unknown precision.
    """
    wanted = formats.get(precision) if precision else None
    directory = _native_directory(source)
    config = LlamaConfig.from_directory(directory)
    stored = Formats.named(checkpoint.read_metadata(directory)["formats"])
    linear, f32 = wanted or stored.linear, DenseFormat(kind="fp32")
    expand = jax.default_backend() == "cpu" if expand is None else expand
    held = (Formats(linear=formats.expanded(linear), head=formats.expanded(stored.head), embed=f32) if expand else
            dataclasses.replace(stored, linear=linear))
    changed = {path: shape for path, shape in parameter_shapes(config).items()
               if _repackings(path, stored, linear, held)}
    making = 0
    if changed:
        sizes = [tree_bytes(stored.abstract(path, shape)) for path, shape in changed.items()]
        making = min(sum(sizes), checkpoint.SHARD_BYTES + max(sizes)) + _packing_bytes(changed.values())
    return dataclasses.replace(Outline.of(config, held), precision=linear.name, directory=directory, making_bytes=making)


def load(source: str | pathlib.Path, precision: str | None = None, *, expand: bool | None = None) -> Model:
    """Loads a model onto the default device.

    Args:
      source: a native checkpoint directory, or anything `checkpoints_tools.convert` reads (a Hugging Face directory, a
        GGUF file, a hub name), which is converted once into the cache directory.
      precision: another precision than the stored one, made by round-to-nearest, a weight at a time: the device need not
        have room for the stored ones.
      expand: compute in f32 on weights expanded once (8-bit activations stay so); by default on CPUs, where half precision
        is emulated.

    Raises:
      UserError: nothing readable there, a damaged checkpoint, an unknown precision, values outside its range, or too little
        device memory, which is found before anything is loaded.
    """
    directory = _native_directory(source)
    made = outline(directory, precision, expand=expand)
    check_room(tree_bytes(made.params) + made.making_bytes, f"loading {directory}")
    linear = formats.get(made.precision)
    weights: dict[str, Weight] = {}
    peaks: Peaks = {}
    reader = checkpoint.CheckpointReader(directory)
    for path, weight in reader.weights():
        weights[path] = Model._repacked(path, weight, reader.shapes[path], reader.formats, linear, made._formats,
                                        peaks)
        del weight  # else it would stay until the next one has come
    _check_peaks(peaks)
    return Model(config=made.config, module=made.module, params=_variables(weights), precision=made.precision,
                 directory=directory)


def random_model(config: LlamaConfig, precision: str, *, head: str | None = None, seed: int = 0) -> Model:
    """Random weights of the given sizes: right for speed, useless for quality.

    Args:
      config: sizes.
      precision: of the layers' weights.
      head: that of lm_head; by default dense.
      seed: of the weights.

    Raises:
      UserError: an unknown precision, one for the lm_head of a model that has none, or weights that the device has no room
        for.
    """
    linear = formats.get(precision)
    dense = linear if isinstance(linear, DenseFormat) else DenseFormat(kind="fp16")
    if head and config.tie_embeddings:
        raise UserError(f"the embedding table serves as the lm_head here, and stays dense; leave out {head} for it")
    held, f32 = Formats(linear=linear, head=formats.get(head) if head else dense, embed=dense), DenseFormat(kind="fp32")
    module = _module(config, held)
    check_room(tree_bytes(Outline.of(config, held).params) + _packing_bytes(parameter_shapes(config).values()),
               "making the weights")
    # in f32 a weight's shape is its logical one
    plain = Outline.of(config, Formats(linear=f32, head=f32, embed=f32)).params
    key = jax.random.key(seed)

    def fill(path: tuple[Any, ...], part: Any) -> Any:
        """One weight at a time: a function that made them all would keep their f32 values side by side."""
        nonlocal key
        key, own_key = jax.random.split(key)
        names = [entry.key for entry in path]
        if isinstance(part, Dense):
            return _random_weight(own_key, module.head_format if "lm_head" in names else linear, part.values.shape)
        return _random_table(own_key, dense, part.shape) if names[-1] == "table" else jnp.ones(part.shape, part.dtype)

    params = jax.tree_util.tree_map_with_path(fill, plain, is_leaf=lambda part: isinstance(part, Dense))
    return Model(config=config, module=module, params=params, precision=linear.name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_weight(key: Array, weight_format: WeightFormat, shape: tuple[int, int]) -> Any:
    return weight_format.init(key, shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_table(key: Array, weight_format: DenseFormat, shape: tuple[int, int]) -> Float[Array, "V D"]:
    return (jax.random.normal(key, shape, jnp.float32) * shape[1] ** -0.5).astype(weight_format.dtype)


def logits(model: Model, token_ids: Sequence[int] | Int32[Array, "M"]) -> Float[Array, "M V"]:
    """f32[len, vocab] of one forward pass; row i scores the token behind token i.

    Raises:
      UserError: no token, or an id outside the vocabulary.
    """
    tokens = check_tokens(token_ids, model.config)
    return _forward(model.module, model.params, jnp.asarray(tokens), model.new_cache(len(tokens)))


def check_tokens(token_ids: Sequence[int] | AnyArray, config: LlamaConfig) -> np.ndarray:
    """The ids as i32[n]; none at all, what is no integer, or one outside the vocabulary, is a `UserError`."""
    if isinstance(token_ids, str | bytes):
        raise UserError("a prompt is a list of token ids; found a text: encode it with the model's tokenizer")
    try:
        tokens = np.asarray(token_ids)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"a prompt is a list of token ids; found what makes no array ({error})") from None
    if tokens.ndim != 1 or not tokens.size:
        raise UserError(f"a prompt is a list of at least one token id; found shape {tokens.shape}")
    if tokens.dtype.kind not in "iu" and not (tokens.dtype == object and all(type(token) is int for token in tokens)):
        raise UserError(f"a prompt is a list of token ids, which are integers; found {tokens.dtype.name} values")
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if outside.any():
        raise UserError(f"token id {tokens[outside][0]} lies outside the vocabulary of {config.vocab_size}")
    return tokens.astype(np.int32)


def check_positions(max_len: int, config: LlamaConfig) -> None:
    """A cache for more tokens than the model has positions is a `UserError`; a dynamic rotary embedding stretches to any
    length."""
    if max_len > config.max_position and config.rope.type != "dynamic":
        raise UserError(f"max_len is {max_len} tokens, and this model knows {config.max_position} positions "
                        "(max_position_embeddings); choose a shorter max_len")


def check_vocabulary(draft: LlamaConfig, target: LlamaConfig) -> None:
    """A draft model of another vocabulary than the target's is a `UserError`."""
    if draft.vocab_size != target.vocab_size:
        raise UserError(f"the draft model has {draft.vocab_size} tokens, the target {target.vocab_size}; choose a draft "
                        "model with the target's tokenizer")


@functools.partial(jax.jit, static_argnames="module")
def _forward(module: Llama, params: Params, tokens: Int32[Array, "M"], cache: KVCache) -> Float[Array, "M V"]:
    return module.apply(params, tokens, cache, method="everything")


def _native_directory(source: str | pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(source)
    if checkpoint.is_native(path):
        return path
    from checkpoints_tools import conversion  # converting is needed for foreign checkpoints alone

    return conversion.prepare(source)


def _module(config: LlamaConfig, held: Formats) -> Llama:
    return Llama(config, held.linear, held.head, held.embed)


def _variables(weights: Mapping[str, Weight]) -> Params:
    """Flax variables of weights by path."""
    return {"params": traverse_util.unflatten_dict(weights, sep="/")}


def _is_linear(path: str) -> bool:
    """Whether a path of `parameter_shapes` is that of a layer's linear weight."""
    return path.startswith("layers_") and path.endswith("/w")


def _repackings(path: str, current: Formats, linear: WeightFormat, held: Formats
                ) -> list[tuple[WeightFormat, WeightFormat]]:
    """From which format into which a weight goes that is in the formats `current` and shall be in those `held`; a layer's is
    rounded to what `linear` can hold on the way."""
    if is_vector(path):
        return []
    stations = [current.of(path), held.of(path)]
    if path == "embed/table":
        stations = [current.embed, held.embed]
    if _is_linear(path):
        stations.insert(1, linear)
    return [(before, after) for before, after in itertools.pairwise(stations) if before != after]


def _packing_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """What packing weights of these shapes, one after another, takes beside them: f32 values that XLA doesn't fuse away."""
    return 4 * max(map(math.prod, shapes))


def _check_peaks(peaks: Peaks) -> None:
    """Refuses values outside their format's range; asked once behind the last weight, so that no weight waits for it."""
    found = jax.device_get({path: largest for path, (largest, _) in peaks.items()})
    for path, (_, weight_format) in peaks.items():
        weight_format.range.check(float(found[path]), f"tensor {path}")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _repack(weight: Weight, before: WeightFormat, after: WeightFormat, shape: tuple[int, int]
            ) -> tuple[Weight, Float[Array, ""]]:
    """The weight in the format `after`, and the largest magnitude of its values."""
    values = before.unpack(weight, shape)
    return after.pack(values), formats.largest(values)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _expand(weight: Weight, before: WeightFormat, shape: tuple[int, int]) -> Weight:
    return formats.expand(before, weight, shape)
