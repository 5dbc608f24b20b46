"""The rotated model of a reader's: the same function in another basis (QuaRot, arXiv:2404.00456, its offline part)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.readers import Reader
from checkpoints_tools.readers.files.rotation_file import check_rotation, save_rotation
from checkpoints_tools.rotation.hadamard import hadamard
from specmq_jax.errors import UserError
from specmq_jax.formats import DenseFormat, Quantised, dense_values

_COMMUTING = ("qk_norm", "biases", "mlp", "windows", "ropes", "rope", "query_scale", "score_cap", "embedding_multiplier",
              "residual_multiplier", "logit_multiplier", "logit_cap")
"""Fields in which a model may differ from Llama."""
_ROWS = 8192
"""Rows that are rotated at a time: their f32 copies take 0.5 GB at D = 8192."""


def random_rotation(size: int, seed: int = 0) -> Float[np.ndarray, "D D"]:
    """An orthogonal matrix, f32[D, D]: a Hadamard matrix whose rows have random signs, over sqrt(D).

    Every entry then has the same magnitude, so that an outlier is spread over all channels evenly (QuIP#,
    arXiv:2402.04396). A size without a known Hadamard matrix gets a random one from the Haar measure, by QR.
    """
    rng = np.random.default_rng(seed)
    matrix = hadamard(size)
    if matrix is not None:
        signs = rng.choice(np.array([-1, 1], np.float32), size) / np.sqrt(size)
        return matrix * signs[:, None].astype(np.float32)
    orthogonal, triangular = np.linalg.qr(rng.standard_normal((size, size)))
    return (orthogonal * np.sign(np.diag(triangular))).astype(np.float32)


def check_rotatable(reader: Reader) -> None:
    """Raises a `UserError` where a checkpoint's weights are quantised, or rotated already, or can't be: its norms
    are no RMSNorms, or stand elsewhere than before attention and MLP."""
    if not isinstance(reader.formats.linear, DenseFormat):
        raise UserError(f"{reader.location} holds {reader.formats.linear.name} weights, and rotating would round them a second "
                        "time; rotate the model that they were made from, then quantise")
    reader.llama.require("rotating", _COMMUTING)
    if reader.rotation_file:
        raise UserError(f"{reader.location} is rotated already ({reader.rotation_file.name}); give the model that it was made "
                        "from")


class RotatedReader(Reader):
    """The rotated model of another reader's, one weight at a time, in f32.

    Norms are folded into the weights behind them and become ones, so that tied embeddings come apart: lm_head carries the
    last norm. Weights that read the stream become Q^T W, those that write it W Q ([in, out]).

    Attributes:
      rotation: Q, f32[D, D].

    Raises:
      UserError: what `check_rotatable` and `check_rotation` raise.
    """

    def __init__(self, reader: Reader, rotation: Float[np.ndarray, "D D"], seed: int = 0):
        """
        Args:
          reader: of a dense model.
          rotation: Q.
          seed: of the signs of the heads' Hadamard matrix.
        """
        check_rotatable(reader)
        check_rotation(rotation, "the matrix", reader.llama.hidden_size)
        self.rotation = np.asarray(rotation, np.float32)
        self._reader, self._on_device = reader, jnp.asarray(self.rotation)
        self._head_rotation = random_rotation(reader.llama.head_dim, seed)
        self.kind = f"{reader.kind}, rotated"
        self.location, self.files, self.tokenizer = reader.location, reader.files, reader.tokenizer
        self.config = reader.config | {"tie_word_embeddings": False}
        self.llama = dataclasses.replace(reader.llama, tie_embeddings=False)
        self.formats, self.stored = reader.formats, reader.stored

    def read(self, path: str) -> Float[np.ndarray, "..."]:
        layer, _, part = path.partition("/")
        if part in ("attention/q_norm/scale", "attention/k_norm/scale", "mlp/gate_up/bias"):
            return self._values(path)
        if path.endswith("/scale"):
            return np.ones(self.llama.hidden_size, np.float32)
        if part == "attention/qkv/bias":
            return self._turn_values(self._values(path)[None].astype(np.float32))[0]
        if path.endswith("/bias"):
            return self._rotated(self._values(path)[None])[0]
        if path == "embed/table":
            return self._rotated(self._values(path))
        if path == "lm_head/w":
            table = self._values("embed/table") if self._reader.llama.tie_embeddings else self._values(path).T
            return self._rotated(table, "norm/scale").T
        if part == "attention/qkv/w":
            return self._turn_values(self._rotated(self._values(path).T, f"{layer}/attention_norm/scale").T)
        if part == "mlp/gate_up/w":
            return self._rotated(self._values(path).T, f"{layer}/mlp_norm/scale").T
        if part == "attention/o/w":
            return self._rotated(self._turn_inputs(self._values(path)))
        return self._rotated(self._values(path))

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        self._reader.save_tokenizer(directory)

    def save_rotation(self, directory: pathlib.Path) -> None:
        save_rotation(directory, self.rotation)

    def digests(self) -> dict[str, str]:
        return self._reader.digests()

    def _values(self, path: str) -> np.ndarray:
        values = self._reader.read(path)
        return np.asarray(dense_values(values) if isinstance(values, Quantised) else values)

    def _rotated(self, rows: Float[np.ndarray, "N D"], norm: str | None = None) -> Float[np.ndarray, "N D"]:
        """rows Q, behind a product with the weight of the norm at that path."""
        scale = np.ones(rows.shape[1], np.float32) if norm is None else self._values(norm)
        made = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), _ROWS):
            # a copy: JAX holds on to what it was last given, and a view would keep the whole matrix
            part = np.array(rows[start:start + _ROWS], np.float32, order="C")
            made[start:start + _ROWS] = _product(part, scale, self._on_device)
        return made

    def _turn_values(self, qkv: Float[np.ndarray, "D N"]) -> Float[np.ndarray, "D N"]:
        """Every head of v times the heads' matrix."""
        width = self.llama.head_dim
        values = qkv[:, -self.llama.num_kv_heads * width:]
        turned = values.reshape(len(values), -1, width) @ self._head_rotation
        qkv[:, -self.llama.num_kv_heads * width:] = turned.reshape(values.shape)
        return qkv

    def _turn_inputs(self, o: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The rows of every head behind the inverse of the heads' matrix."""
        heads = o.astype(np.float32).reshape(self.llama.num_heads, self.llama.head_dim, -1)
        return (self._head_rotation.T @ heads).reshape(o.shape)


@jax.jit
def _product(rows: Float[Array, "N D"], scale: Float[Array, "D"], rotation: Float[Array, "D D"]) -> Float[Array, "N D"]:
    return jnp.matmul(rows * scale.astype(jnp.float32), rotation, precision=jax.lax.Precision.HIGHEST)
