"""A model ready to run: configuration, Flax module, parameters on the device."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from specmq_jax import checkpoint, formats
from specmq_jax.cache import KVCache
from specmq_jax.config import LlamaConfig
from specmq_jax.errors import UserError
from specmq_jax.formats import Dense, DenseFormat, WeightFormat
from specmq_jax.llama import Llama
from specmq_jax.memory import check_room

Params = Any


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
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

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads on this device: all but an untied embedding table."""
        skipped = 0 if self.config.tie_embeddings else self.params["params"]["embed"]["table"].nbytes
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) - skipped

    def new_cache(self, max_len: int, *, limit: int | None = None) -> KVCache:
        """An empty cache of `max_len` rows in the layers' dtype, meant for `limit` tokens (default: as many)."""
        return KVCache.create(self.config, max_len, self.module.format.dtype, limit=limit)

    def with_precision(self, precision: str) -> "Model":
        """The same weights at another precision, quantised by round-to-nearest; embedding and lm_head are shared."""
        if precision == self.precision:
            return self
        return _convert_linears(self, formats.get(precision), expand=self._is_expanded)

    @property
    def _is_expanded(self) -> bool:
        return self.module.format.name != self.precision


def load(source: str | pathlib.Path, precision: str | None = None, *, expand: bool | None = None) -> Model:
    """Loads a model onto the default device.

    Args:
      source: a native checkpoint directory, or anything `checkpoints_tools.convert` reads (a Hugging Face directory, a
        GGUF file, a hub name), which is converted once into the cache directory.
      precision: another precision than the stored one, made by round-to-nearest.
      expand: compute in f32 on weights expanded once; by default on CPUs, where half precision is emulated.

    Raises:
      UserError: nothing readable there, a damaged checkpoint, an unknown precision.
    """
    wanted = formats.get(precision) if precision else None
    directory = _native_directory(source)
    config = LlamaConfig.from_directory(directory)
    stored = checkpoint.read_metadata(directory)["formats"]
    linear, head, embed = (formats.get(stored[part]) for part in ("linear", "head", "embed"))
    module = Llama(config, linear, head, embed)
    check_room(sum(f.stat().st_size for f in (directory / "weights").rglob("*") if f.is_file()), f"loading {directory}")
    model = Model(config=config, module=module, params=checkpoint.restore(directory), precision=linear.name,
                  directory=directory)
    expand = jax.default_backend() == "cpu" if expand is None else expand
    if wanted is not None and wanted != linear:
        return _convert_linears(model, wanted, expand=expand)
    return _convert_linears(model, linear, expand=True) if expand else model


def random_model(config: LlamaConfig, precision: str, *, seed: int = 0) -> Model:
    """Random weights of the given sizes: right for speed, useless for quality."""
    linear = formats.get(precision)
    dense = linear if isinstance(linear, DenseFormat) else DenseFormat(kind="fp16")
    module = Llama(config, linear, dense, dense)
    cache = jax.eval_shape(lambda: KVCache.create(config, 128, linear.dtype))

    @jax.jit
    def init(key: Array) -> Params:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
        return module.init(key, jnp.zeros(1, jnp.int32), zeros, method="everything")

    return Model(config=config, module=module, params=init(jax.random.key(seed)), precision=precision)


def logits(model: Model, token_ids: Sequence[int] | Int32[Array, "M"]) -> Float[Array, "M V"]:
    """f32[len, vocab] of one forward pass; row i scores the token behind token i.

    Raises:
      UserError: no token, or an id outside the vocabulary.
    """
    tokens = check_tokens(token_ids, model.config)
    return _forward(model.module, model.params, jnp.asarray(tokens), model.new_cache(len(tokens)))


def check_tokens(token_ids: Sequence[int] | np.ndarray, config: LlamaConfig) -> np.ndarray:
    """The ids as i32[n]; none at all, or one outside the vocabulary, is a `UserError`."""
    tokens = np.asarray(token_ids, np.int32)
    if tokens.ndim != 1 or not tokens.size:
        raise UserError(f"a prompt is a list of at least one token id; found shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)][0]
        raise UserError(f"token id {wrong} lies outside the vocabulary of {config.vocab_size}")
    return tokens


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
    from checkpoints_tools import convert  # converting is needed for foreign checkpoints alone

    return convert.prepare(source)


def _convert_linears(model: Model, wanted: WeightFormat, *, expand: bool) -> Model:
    """Repacks each layer's linear weights; with `expand`, everything is then held as f32."""
    f32 = DenseFormat(kind="fp32")
    current, held = model.module.format, f32 if expand else wanted

    def shapes() -> dict[str, tuple[int, int]]:
        c = model.config
        return {"qkv": (c.hidden_size, c.qkv_features), "o": (c.num_heads * c.head_dim, c.hidden_size),
                "gate_up": (c.hidden_size, 2 * c.intermediate_size), "down": (c.intermediate_size, c.hidden_size)}

    @functools.partial(jax.jit, static_argnames="shape")
    def repack(weight: Any, shape: tuple[int, int]) -> Any:
        if model.precision != wanted.name:
            weight = wanted.pack(current.unpack(weight, shape))
            return f32.pack(wanted.unpack(weight, shape)) if expand else weight
        return f32.pack(current.unpack(weight, shape))

    def convert(name: str, part: Any) -> Any:
        if name in shapes():
            return {"w": repack(part["w"], shapes()[name])}
        return {key: convert(key, value) for key, value in part.items()} if isinstance(part, dict) else part

    params = dict(model.params["params"])
    for name in params:
        if name.startswith("layers_"):
            params[name] = convert(name, params[name])
    head_format, embed_format = model.module.head_format, model.module.embed_format
    if expand and embed_format != f32:
        params["embed"] = {"table": params["embed"]["table"].astype(jnp.float32)}
        embed_format = f32
    if expand and head_format != f32:
        if "lm_head" in params:
            shape = (model.config.hidden_size, model.config.vocab_size)
            params["lm_head"] = {"w": Dense(head_format.unpack(params["lm_head"]["w"], shape))}
        head_format = f32
    module = Llama(model.config, held, head_format, embed_format)
    return dataclasses.replace(model, module=module, params={"params": params}, precision=wanted.name)
