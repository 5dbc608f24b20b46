"""Passes over batches of sequences, for making answers and for training, where decoding's one-sequence kernels do not fit.

Plain jnp over the parameters of `network.llama.Llama` and `network.eagle.EagleHead` with dense weights; a test holds them
equal to the modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.rope.reference import rotate
from specmq_jax.loading.model import Model
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.eagle import EagleConfig

Params = Mapping[str, Any]
Attend = Callable[[int, Float[Array, "B S Hq d"], Float[Array, "B S Hkv d"], Float[Array, "B S Hkv d"]],
                  Float[Array, "B S Hq d"]]
"""Layer number, rotated queries and keys, and values of the new rows to what attention mixes for them."""


def dense_parameters(model: Model) -> dict[str, Any]:
    """The model's parameters with each linear weight as a plain [K, N] array in the activations' dtype."""
    config, module = model.config, model.module
    shapes = {"qkv": (config.hidden_size, config.qkv_features), "o": (config.num_heads * config.head_dim, config.hidden_size),
              "gate_up": (config.hidden_size, 2 * config.intermediate_size),
              "down": (config.intermediate_size, config.hidden_size), "lm_head": (config.hidden_size, config.vocab_size)}

    def convert(name: str, part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        if "w" in part:
            packing = module.head_format if name == "lm_head" else module.format
            return {"w": packing.unpack(part["w"], shapes[name]).astype(module.format.dtype)}
        return {key: convert(key, value) for key, value in part.items()}

    return jax.jit(lambda params: convert("", params))(model.params["params"])


def linear(x: Float[Array, "... K"], weight: Float[Array, "K N"]) -> Float[Array, "... N"]:
    """x @ w, accumulated in f32."""
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.matmul(x.astype(weight.dtype), weight, precision=precision, preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """In f32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def attention(q: Float[Array, "B S Hq d"], k: Float[Array, "B Hkv T d"], v: Float[Array, "B Hkv T d"],
              mask: Bool[Array, "#B S T"], own: Sequence[tuple[Array, Array]] = ()) -> Float[Array, "B S Hq d"]:
    """Grouped-query attention with an f32 softmax.

    Args:
      q: queries.
      k, v: what all rows may see.
      mask: which of them each row sees.
      own: keys and values [B, S, Hkv, d] that each row sees of its own index alone.
    """
    batch, rows, heads, width = q.shape
    grouped = q.reshape(batch, rows, k.shape[1], -1, width)
    scale = width**-0.5
    scores = jnp.einsum("bskgd,bktd->bkgst", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = [jnp.where(mask[:, None, None], scores, -1e30)]
    scores += [jnp.einsum("bskgd,bskd->bkgs", grouped, key, preferred_element_type=jnp.float32)[..., None] * scale
               for key, _ in own]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(v.dtype)
    shared = k.shape[2]
    mixed = jnp.einsum("bkgst,bktd->bskgd", weights[..., :shared], v, preferred_element_type=jnp.float32)
    for i, (_, value) in enumerate(own):
        mixed += jnp.einsum("bkgs,bskd->bskgd", weights[..., shared + i], value, preferred_element_type=jnp.float32)
    return mixed.reshape(q.shape).astype(q.dtype)


def heads_first(x: Float[Array, "B S H d"]) -> Float[Array, "B H S d"]:
    return x.transpose(0, 2, 1, 3)


def target_states(config: LlamaConfig, params: Params, tokens: Int32[Array, "B S"], positions: Int32[Array, "B S"],
                  attend: Attend, *, length: int, capture: tuple[int, ...] = ()
                  ) -> tuple[Float[Array, "B S D"], Float[Array, "B S F"]]:
    """The states after the final norm, and what a head reads: those, or the captured streams joined.

    Args:
      config, params: the target's; `params` as `dense_parameters` gives them.
      tokens: ids; positions: of each.
      attend: runs the attention, and keeps a cache where there is one.
      length: the longest sequence meant, which some rotary embeddings depend on.
      capture: layers whose entering residual streams are read.
    """
    dtype = params["layers_0"]["attention"]["qkv"]["w"].dtype
    rotary = rotation(config, positions, length)
    residual, captured = params["embed"]["table"][tokens].astype(jnp.float32), {}
    for i in range(config.num_layers):
        captured[i] = residual
        layer = params[f"layers_{i}"]
        x = rms_norm(residual, layer["attention_norm"]["scale"], config.rms_norm_eps).astype(dtype)
        residual = residual + _attention_block(config, layer["attention"], x, rotary, lambda *qkv, i=i: attend(i, *qkv))
        residual = residual + _mlp(config, layer, residual)
    hidden = rms_norm(residual, params["norm"]["scale"], config.rms_norm_eps).astype(dtype)
    return hidden, jnp.concatenate([captured[i] for i in capture], axis=-1) if capture else hidden


def target_logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """f32 logits of final-norm states."""
    weight = params["lm_head"]["w"] if "lm_head" in params else params["embed"]["table"].astype(hidden.dtype).T
    return linear(hidden, weight)


def rotation(config: LlamaConfig, positions: Int32[Array, "B S"], length: int
             ) -> tuple[Float[Array, "B S d2"], Float[Array, "B S d2"]]:
    """cos and sin of the rotary embedding."""
    frequencies, scale = config.rope.frequencies(config.head_dim, length)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def unrolled_features(config: EagleConfig, params: Params, embedded: Float[Array, "B S E"], states: Float[Array, "B S F"],
                      positions: Int32[Array, "B S"], mask: Bool[Array, "B S S"], *, steps: int, length: int
                      ) -> list[Float[Array, "B S D"]]:
    """A head's features in `steps` successive drafts from every row, as a growing chain of a draft tree computes them.

    Draft j of row t takes the token at t + 1 + j and, from j = 1 on, the head's own feature of draft j - 1. It stands at
    position t + j and sees the committed rows up to t (which `mask` allows) and the row's own drafts before it: EAGLE-3's
    training-time test (arXiv 2503.01840), and HASS's (arXiv 2408.15766) for an EAGLE-2 head.

    Args:
      config, params: of a head of one layer.
      embedded: token embeddings, row t for the token at t.
      states: the target's states or captured streams at t.
      positions, mask: of the sequences.
      steps: how many drafts.
      length: the longest sequence meant.
    """
    layer, dtype = config.layer, params["attention"]["qkv"]["w"].dtype
    shared, own, features = None, [], []
    for step in range(steps):
        residual, x = _joined(config, params, shift(embedded, step + 1), states, own=step > 0)
        rotary = rotation(layer, positions + step, length)

        def attend(q: Array, k: Array, v: Array, step: int = step) -> Array:
            nonlocal shared
            if step == 0:
                shared = heads_first(k), heads_first(v)
            else:
                own.append((k, v))
            return attention(q, *shared, mask, own)

        residual = residual + _attention_block(layer, params["attention"], x.astype(dtype), rotary, attend)
        residual = residual + _mlp(layer, params, residual)
        features.append(residual)
        states = residual
    return features


def head_logits(config: EagleConfig, params: Params, features: Float[Array, "... D"], output: Float[Array, "D V"]
                ) -> Float[Array, "... V"]:
    """f32 scores over the head's vocabulary; `output` is the target's projection or the head's own."""
    if config.version == 3:
        features = rms_norm(features, params["norm"]["scale"], config.layer.rms_norm_eps)
    return linear(features, output)


def shift(x: Array, count: int) -> Array:
    """Row t of the second axis becomes row t + count; zeros come in at the end."""
    return jnp.pad(x[:, count:], [(0, 0), (0, count), *[(0, 0)] * (x.ndim - 2)])


def _joined(config: EagleConfig, params: Params, embedded: Array, states: Array, *, own: bool) -> tuple[Array, Array]:
    """The residual stream and the attention's input, as in `EagleHead`."""
    eps = config.layer.rms_norm_eps
    if config.version == 3:
        residual = states.astype(jnp.float32) if own else linear(states, params["fc"]["w"])
        parts = rms_norm(embedded, params["embed_norm"]["scale"], eps), rms_norm(residual, params["state_norm"]["scale"], eps)
        return residual, jnp.concatenate(parts, axis=-1)
    dtype = params["fc"]["w"].dtype
    residual = linear(jnp.concatenate([embedded.astype(dtype), states.astype(dtype)], axis=-1), params["fc"]["w"])
    residual = residual + params["fc_bias"] if config.bias else residual
    return residual, residual


def _attention_block(config: LlamaConfig, params: Params, x: Array, rotary: tuple[Array, Array],
                     attend: Callable[[Array, Array, Array], Array]) -> Array:
    batch, rows, _ = x.shape
    split = linear(x, params["qkv"]["w"]).reshape(batch, rows, -1, config.head_dim)
    q, k, v = jnp.split(split, [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)
    q, k = (jax.vmap(rotate)(part, *rotary) for part in (q, k))
    mixed = attend(q.astype(x.dtype), k.astype(x.dtype), v.astype(x.dtype))
    return linear(mixed.reshape(batch, rows, -1), params["o"]["w"])


def _mlp(config: LlamaConfig, layer: Params, residual: Array) -> Array:
    x = rms_norm(residual, layer["mlp_norm"]["scale"], config.rms_norm_eps)
    gate, up = jnp.split(linear(x, layer["mlp"]["gate_up"]["w"]), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, layer["mlp"]["down"]["w"])
