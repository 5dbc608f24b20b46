"""The parts of a decoder layer, as Flax modules that never mention a precision.

Linear layers return partial sums [S, M, N]; the kernel that reads them adds them up in f32, so a split product costs no
launch of its own.
"""

import functools

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.mlp import api as mlp_kernels
from pallas_kernels.norm import RowScale
from pallas_kernels.norm import api as norm_kernels
from specmq_jax.formats import DenseFormat, WeightFormat
from specmq_jax.network.cache import LayerCache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.rows import Rows


class Linear(nn.Module):
    """x @ w, without bias; options as in `WeightFormat.matmul`.

    What it multiplies is sown as "inputs" among the intermediates, which costs nothing where they are not mutable.
    """

    features: int
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None
    halves: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "M K"], peaks: Float[Array, "M C"] | None = None) -> Float[Array, "S M N"]:
        self.sow("intermediates", "inputs", x)
        # Flax would trace `init`, quantiser and all, at every use to compare shapes; the formats check those themselves.
        present = self.has_variable("params", "w")
        weight = (self.get_variable("params", "w") if present else
                  self.param("w", self.format.init, (x.shape[-1], self.features)))
        return self.format.matmul(x, weight, peaks=peaks, halves=self.halves, reproducible=self.reproducible,
                                  implementation=self.implementation)


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
    """Adds a sub-block's output to the residual stream (f32) and normalises it (true RMSNorm).

    `format` is of the weights that multiply what comes out.
    """

    eps: float
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None

    @nn.compact
    def __call__(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None, *, deferred: bool = False
                 ) -> tuple[Float[Array, "M D"], Normed]:
        """The sum and its normalised form, whose factor is left to the reader where `deferred` allows it."""
        scale = self.param("scale", nn.initializers.ones_init(), residual.shape[-1:], jnp.float32)
        if not deferred:
            residual, values = norm_kernels.add_rms_norm(
                residual, update, scale, eps=self.eps, out_dtype=self.format.dtype, reproducible=self.reproducible,
                implementation=self.implementation)
            return residual, Normed(values)
        residual, values, row_scale, peaks = norm_kernels.add_rms_norm_deferred(
            residual, update, scale, eps=self.eps, out_dtype=self.format.dtype,
            with_peaks=self.format.wants_peaks, reproducible=self.reproducible, implementation=self.implementation)
        return residual, Normed(values, row_scale, peaks)


class Attention(nn.Module):
    """Grouped-query attention over the layer's cache, which it extends by the rows it is given."""

    config: LlamaConfig
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Normed, rows: Rows, cache: LayerCache) -> tuple[Float[Array, "S M D"], LayerCache]:
        config = self.config
        linear = functools.partial(Linear, format=self.format, reproducible=self.reproducible,
                                   implementation=self.implementation, halves=True)
        qkv = linear(config.qkv_features, name="qkv")(x.values, x.peaks)
        query, cache = cache.append(qkv, rows, config, x.row_scale, implementation=self.implementation)
        mixed = cache.attend(query, rows, implementation=self.implementation)
        mixed = mixed.reshape(len(x.values), config.num_heads * config.head_dim)
        return linear(config.hidden_size, name="o")(mixed), cache


class Mlp(nn.Module):
    """down(silu(gate) * up)."""

    intermediate_size: int
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Normed) -> Float[Array, "S M D"]:
        linear = functools.partial(Linear, format=self.format, reproducible=self.reproducible,
                                   implementation=self.implementation, halves=True)
        gate_up = linear(2 * self.intermediate_size, name="gate_up")(x.values, x.peaks)
        hidden, peaks = mlp_kernels.silu_mul(gate_up, out_dtype=self.format.dtype, row_scale=x.row_scale,
                                             with_peaks=self.format.wants_peaks, reproducible=self.reproducible,
                                             implementation=self.implementation)
        return linear(x.values.shape[-1], name="down")(hidden, peaks)


class Layer(nn.Module):
    """Attention and MLP, each behind its norm. The MLP's output is returned unadded: the next norm adds it."""

    config: LlamaConfig
    format: WeightFormat
    reproducible: bool = False
    implementation: str | None = None

    def setup(self) -> None:
        config, how = self.config, (self.format, self.reproducible, self.implementation)
        self.attention_norm = AddNorm(config.rms_norm_eps, *how)
        self.attention = Attention(config, *how)
        self.mlp_norm = AddNorm(config.rms_norm_eps, *how)
        self.mlp = Mlp(config.intermediate_size, *how)

    def __call__(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None, rows: Rows, cache: LayerCache
                 ) -> tuple[Float[Array, "M D"], Float[Array, "M D"], Float[Array, "S M D"], LayerCache]:
        """Returns the residual stream that entered the layer, the one behind its attention, the MLP's output, the cache."""
        entering, update, cache = self.attend(residual, update, rows, cache)
        return entering, *self.feed_forward(entering, update), cache

    def attend(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None, rows: Rows, cache: LayerCache
               ) -> tuple[Float[Array, "M D"], Float[Array, "S M D"], LayerCache]:
        """The first half: the stream that entered, the attention's output, the cache."""
        entering, x = self.attention_norm(residual, update, deferred=True)
        return entering, *self.attention(x, rows, cache)

    def feed_forward(self, residual: Float[Array, "M D"], update: Float[Array, "S M D"] | None
                     ) -> tuple[Float[Array, "M D"], Float[Array, "S M D"]]:
        """The second half: the stream that entered it, the MLP's output."""
        residual, x = self.mlp_norm(residual, update, deferred=True)
        return residual, self.mlp(x)


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
