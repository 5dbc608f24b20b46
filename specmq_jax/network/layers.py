"""The parts of a decoder layer, as Flax modules that never mention a precision.

Linear layers return partial sums [S, M, N]; the kernel that reads them adds them up in f32, so a split product costs no
launch of its own.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import exact
from pallas_kernels.finite import narrowed
from pallas_kernels.mlp import api as mlp_kernels
from pallas_kernels.norm import RowScale
from pallas_kernels.norm import api as norm_kernels
from pallas_kernels.partials import add_up
from specmq_jax.formats import DenseFormat, WeightFormat
from specmq_jax.network.cache import LayerCache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.rows import Rows


class Linear(nn.Module):
    """x @ w, and a bias where there is one; options as in `WeightFormat.matmul`.

    What it multiplies is sown as "inputs" among the intermediates, which costs nothing where they are not mutable.
    """

    features: int
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None
    halves: bool = False
    with_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "M K"], peaks: Float[Array, "M C"] | None = None, row_scale: RowScale | None = None
                 ) -> Float[Array, "S M N"]:
        """Partial sums. With a bias a single one in f32, to which a factor that x is still owed has been applied."""
        self.sow("intermediates", "inputs", x)
        # Flax would trace `init`, quantiser and all, at every use to compare shapes; the formats check those themselves.
        present = self.has_variable("params", "w")
        weight = (self.get_variable("params", "w") if present else
                  self.param("w", self.format.init, (x.shape[-1], self.features)))
        sums = self.format.matmul(x, weight, peaks=peaks, halves=self.halves, reproducible=self.reproducible,
                                  implementation=self.implementation)
        if not self.with_bias:
            return sums
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return (settled(sums, row_scale) + bias)[None]


class Normed(flax.struct.PyTreeNode):
    """Normalised rows, or rows that are still owed a factor each, which the readers of a product with them apply.

    Attributes:
      values: float[M, D].
      row_scale: the factor, None where it is applied.
      peaks: f32[M, C], the largest magnitudes in C parts of each row of `values`, None where they are not known.
    """

    values: Float[Array, "M D"]
    row_scale: RowScale | None = None
    peaks: Float[Array, "M C"] | None = None


class AddNorm(nn.Module):
    """Adds a sub-block's output to the residual stream (f32) and normalises it: true RMSNorm, or with `centred` LayerNorm.

    `format` is of the weights that multiply what comes out; a centred norm may have a bias.
    """

    eps: float
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None
    centred: bool = False
    with_bias: bool = False

    @nn.compact
    def __call__(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None, *, deferred: bool = False
                 ) -> tuple[Float[Array, "M D"], Normed]:
        """The sum and its normalised form, whose factor is left to the reader where `deferred` allows it."""
        scale = self.param("scale", nn.initializers.ones_init(), residual.shape[-1:], jnp.float32)
        if self.centred:
            residual = added(residual, update)
            values = centred(residual, self.eps, self.reproducible) * scale
            return residual, Normed(narrowed(self._with_bias(values), self.format.dtype))
        if not deferred:
            residual, values = norm_kernels.add_rms_norm(
                residual, update, scale, eps=self.eps, out_dtype=self.format.dtype, reproducible=self.reproducible,
                implementation=self.implementation)
            return residual, Normed(values)
        residual, values, row_scale, peaks = norm_kernels.add_rms_norm_deferred(
            residual, update, scale, eps=self.eps, out_dtype=self.format.dtype,
            with_peaks=self.format.wants_peaks, reproducible=self.reproducible, implementation=self.implementation)
        return residual, Normed(values, row_scale, peaks)

    def _with_bias(self, values: Float[Array, "M D"]) -> Float[Array, "M D"]:
        if not self.with_bias:
            return values
        return values + self.param("bias", nn.initializers.zeros_init(), values.shape[-1:], jnp.float32)


class HeadNorms(nn.Module):
    """LayerNorm of each head with a weight of its own, without bias."""

    head_dim: int
    eps: float
    reproducible: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "M F"]) -> Float[Array, "M F"]:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[1:], jnp.float32)
        return centred(x.reshape(-1, self.head_dim), self.eps, self.reproducible).reshape(x.shape) * scale


class Attention(nn.Module):
    """Grouped-query attention over the layer's cache, which it extends by the rows it is given."""

    config: LlamaConfig
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None
    index: int = 0

    @nn.compact
    def __call__(self, x: Normed, rows: Rows, cache: LayerCache) -> tuple[Float[Array, "S M D"], LayerCache]:
        config = self.config
        linear = functools.partial(Linear, format=self.format, reproducible=self.reproducible,
                                   implementation=self.implementation, halves=True)
        has_bias = "qkv" in config.biases
        qkv = linear(config.qkv_features, with_bias=has_bias, name="qkv")(x.values, x.peaks, x.row_scale)
        row_scale = None if has_bias else x.row_scale
        if config.qk_norm:
            qkv, row_scale = self._with_norms(settled(qkv, row_scale))[None], None
        rows = rows.turned_by(config.rope_table(self.index))
        query, cache = cache.append(qkv, rows, config, row_scale, implementation=self.implementation)
        mixed = cache.attend(query, rows, config.view(self.index), implementation=self.implementation)
        mixed = mixed.reshape(len(x.values), config.num_heads * config.head_dim)
        return linear(config.hidden_size, with_bias="o" in config.biases, name="o")(mixed), cache

    def _with_norms(self, qkv: Float[Array, "M F"]) -> Float[Array, "M F"]:
        """q, k and v side by side, with q and k normalised."""
        config, size = self.config, self.config.num_kv_heads * self.config.head_dim
        parts = jnp.split(qkv, (config.num_heads * config.head_dim, qkv.shape[1] - size), axis=1)
        for i, name in enumerate(("q_norm", "k_norm")):
            if config.qk_norm == "each":
                parts[i] = HeadNorms(config.head_dim, config.rms_norm_eps, self.reproducible, name=name)(parts[i])
                continue
            norm = AddNorm(config.rms_norm_eps, DenseFormat(kind="fp32"), self.reproducible, self.implementation, name=name)
            rows = parts[i] if config.qk_norm == "all" else parts[i].reshape(-1, config.head_dim)
            parts[i] = norm(rows, None)[1].values.reshape(parts[i].shape)
        return jnp.concatenate(parts, axis=1)


class Mlp(nn.Module):
    """down(act(gate) * up), or down(act(up)); `kind` is as `LlamaConfig.mlp`."""

    intermediate_size: int
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None
    kind: str = "silu"
    with_bias: bool = False

    @nn.compact
    def __call__(self, x: Normed) -> Float[Array, "S M D"]:
        linear = functools.partial(Linear, format=self.format, reproducible=self.reproducible,
                                   implementation=self.implementation, halves=True, with_bias=self.with_bias)
        is_gated = self.kind != "plain-gelu"
        width, name = (2 * self.intermediate_size, "gate_up") if is_gated else (self.intermediate_size, "up")
        sums = linear(width, name=name)(x.values, x.peaks, x.row_scale)
        row_scale = None if self.with_bias else x.row_scale
        if self.kind == "silu":
            hidden, peaks = mlp_kernels.silu_mul(sums, out_dtype=self.format.dtype, row_scale=row_scale,
                                                 with_peaks=self.format.wants_peaks, reproducible=self.reproducible,
                                                 implementation=self.implementation)
        else:
            hidden, peaks = narrowed(_gelu(settled(sums, row_scale), is_gated), self.format.dtype), None
        return linear(x.values.shape[-1], name="down")(hidden, peaks)


class Layer(nn.Module):
    """Attention and MLP with the norms of `config.block`. What is added last is returned unadded: the next norm adds it."""

    config: LlamaConfig
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None
    index: int = 0

    def setup(self) -> None:
        config, how = self.config, (self.format, self.reproducible, self.implementation)
        norm = functools.partial(AddNorm, config.rms_norm_eps, *how, centred=config.norm == "layer",
                                 with_bias="norm" in config.biases)
        self.attention = Attention(config, *how, index=self.index)
        self.mlp = Mlp(config.intermediate_size, *how, kind=config.mlp, with_bias="mlp" in config.biases)
        if config.block != "post":
            self.attention_norm = norm()
        if config.block in ("pre", "both"):
            self.mlp_norm = norm()
        if config.block in ("post", "both"):
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None, rows: Rows, cache: LayerCache
                 ) -> tuple[Float[Array, "M D"], Float[Array, "M D"], Float[Array, "S M D"], LayerCache]:
        """Returns the residual stream that entered the layer, the one behind its attention, the MLP's output, the cache."""
        if self.config.block == "parallel":
            entering, x = self.attention_norm(residual, update, deferred=True)
            mixed, cache = self.attention(x, rows, cache)
            return entering, entering, self._scaled((add_up(mixed) + add_up(self.mlp(x)))[None]), cache
        entering, update, cache = self.attend(residual, update, rows, cache)
        return entering, *self.feed_forward(entering, update), cache

    def attend(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None, rows: Rows, cache: LayerCache
               ) -> tuple[Float[Array, "M D"], Float[Array, "S M D"], LayerCache]:
        """The first half: the stream that entered, the attention's output, the cache."""
        entering, x = self._entering("attention_norm", residual, update)
        update, cache = self.attention(x, rows, cache)
        return entering, self._leaving("attention_post_norm", update), cache

    def feed_forward(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None
                     ) -> tuple[Float[Array, "M D"], Float[Array, "S M D"]]:
        """The second half: the stream that entered it, the MLP's output."""
        residual, x = self._entering("mlp_norm", residual, update)
        return residual, self._leaving("mlp_post_norm", self.mlp(x))

    def _entering(self, norm: str, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None
                  ) -> tuple[Float[Array, "M D"], Normed]:
        """The stream with what was unadded, and a half's input."""
        if self.config.block != "post":
            return getattr(self, norm)(residual, update, deferred=True)
        residual = added(residual, update)
        return residual, Normed(narrowed(residual, self.format.dtype))

    def _leaving(self, norm: str, update: Float[Array, "S M D"]) -> Float[Array, "S M D"]:
        """What a half adds to the stream."""
        if self.config.block in ("post", "both"):
            _, normed = getattr(self, norm)(add_up(update), None)
            update = normed.values.astype(jnp.float32)[None]
        return self._scaled(update)

    def _scaled(self, update: Float[Array, "S M D"]) -> Float[Array, "S M D"]:
        factor = self.config.residual_multiplier
        return update if factor == 1 else (add_up(update) * factor)[None]


class Embedding(nn.Module):
    """A table of token vectors, which may also serve as the output projection."""

    vocab_size: int
    features: int
    format: DenseFormat
    reproducible: bool = False
    implementation: str | None = None

    def setup(self) -> None:
        self.table = self.param("table", nn.initializers.normal(self.features**-0.5), (self.vocab_size, self.features),
                                self.format.dtype)

    def __call__(self, tokens: Int32[Array, "M"]) -> Float[Array, "M D"]:
        return self.table[tokens].astype(jnp.float32)

    def attend(self, x: Float[Array, "M D"]) -> Float[Array, "M V"]:
        return self.format.transposed_matmul(x, self.table, reproducible=self.reproducible,
                                             implementation=self.implementation)


def added(residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None) -> Float[Array, "M D"]:
    """The residual stream with partial sums added."""
    return residual if update is None else residual + add_up(update)


def settled(sums: Float[Array, "S M N"], row_scale: RowScale | None) -> Float[Array, "M N"]:
    """Partial sums added up, with the factor that their rows are owed."""
    return add_up(sums) if row_scale is None else add_up(sums) * row_scale.values[:, None]


def centred(rows: Float[Array, "M D"], eps: float, reproducible: bool) -> Float[Array, "M D"]:
    """(x - mean) / sqrt(variance + eps), LayerNorm (arXiv:1607.06450) before its weight.

    Where it is reproducible, a row's bits on a CPU are the same whatever other rows there are.
    """
    total = exact.row_sums if reproducible else functools.partial(jnp.sum, axis=-1, keepdims=True)
    rows = rows - total(rows) / rows.shape[1]
    return rows / jnp.sqrt(total(exact.rounded(rows * rows)) / rows.shape[1] + eps)


def _gelu(sums: Float[Array, "M N"], is_gated: bool) -> Float[Array, "M I"]:
    if not is_gated:
        return jax.nn.gelu(sums, approximate=True)
    gate, up = jnp.split(sums, 2, axis=1)
    return jax.nn.gelu(gate, approximate=True) * up
