"""What every reader gives: a configuration, a tokenizer, and logical weights one at a time."""

import abc
import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints_tools.readers.files.rotation_file import load_rotation
from specmq_jax.formats import Logical, Quantised
from specmq_jax.network.config import LlamaConfig, head_order
from specmq_jax.network.families import FAMILIES
from specmq_jax.network.parameters import Formats, parameter_shapes

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a file holds one module's weight: the name of its type there, and its bytes."""

    type: str
    nbytes: int


class Reader(abc.ABC):
    """A checkpoint whose headers have been found sound.

    Attributes:
      kind: what it is, in words.
      location: directory or file.
      config: as config.json of a native checkpoint will hold it.
      llama: `config`, parsed.
      formats: nearest to what the files hold.
      stored: how each module is held, by the name it has there.
      files: that hold the weights.
      tokenizer: what kind there is, in words; None without one.
      rotation_file: holds the matrix by which the weights were rotated; None where nothing says that they were.
      notes: what a user should know of how the files were read, a line each.
    """

    kind: str
    location: pathlib.Path
    config: dict[str, Any]
    llama: LlamaConfig
    formats: Formats
    stored: Mapping[str, Stored]
    files: Sequence[pathlib.Path]
    tokenizer: str | None
    rotation_file: pathlib.Path | None = None
    notes: Sequence[str] = ()

    @property
    def inputs(self) -> Sequence[pathlib.Path]:
        """Every file that is read or copied."""
        return self.files

    @abc.abstractmethod
    def read(self, path: str) -> Logical:
        """The logical weight at a path of `parameter_shapes`."""

    @abc.abstractmethod
    def save_tokenizer(self, directory: pathlib.Path) -> None:
        """Puts tokenizer files and generation_config.json, as far as there are any, into `directory`."""

    def save_rotation(self, directory: pathlib.Path) -> None:
        """Puts the rotation's file, where there is one, into `directory`: heads are adapted to a rotated model by it."""
        if self.rotation_file:
            if self.rotation_file.suffix == ".safetensors":  # others need PyTorch, and are looked at where they are used
                load_rotation(self.rotation_file, self.llama.hidden_size)
            shutil.copyfile(self.rotation_file, directory / self.rotation_file.name)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files by name."""
        return {path.name: sha256(path) for path in self.files}


class ModuleReader(Reader):
    """A reader of files that hold Hugging Face's modules, q, k, v and gate, up each for itself or fused."""

    _precisions: Mapping[str, str]
    """The precision that holds values of each type in the files without loss."""

    def _locate(self) -> None:
        """Finds and checks every module from the headers alone."""
        self._modules: dict[str, tuple[str, ...]] = {}
        stored = {}
        for path, shape in parameter_shapes(self.llama).items():
            modules = module_shapes(self.llama, path, shape, self._holds)
            stored |= {module: self._check(module, expected) for module, expected in modules.items()}
            self._modules[path] = tuple(modules)
        self.stored = stored

    def read(self, path: str) -> Logical:
        parts = [self._read_module(module) for module in self._modules[path]]
        return as_computed(self.llama, path, parts[0] if len(parts) == 1 else _concatenate(parts))

    def _find_formats(self) -> Formats:
        embed = self._precision("model.embed_tokens")
        return Formats.named({"linear": self._linear_format(), "embed": embed,
                              "head": self._head_format() if "lm_head" in self.stored else embed})

    def _head_format(self) -> str:
        return self._precision("lm_head")

    def _linear_format(self) -> str:
        return self._precision(*(module for path, modules in self._modules.items() for module in modules
                                 if path.startswith("layers_") and path.endswith("/w")))

    def _precision(self, *modules: str) -> str:
        """The one that holds all these modules without loss."""
        found = {self._precisions[self.stored[module].type] for module in modules}
        return found.pop() if len(found) == 1 else "fp32"

    @abc.abstractmethod
    def _holds(self, module: str) -> bool:
        """Whether the files hold a module of that Hugging Face name."""

    @abc.abstractmethod
    def _check(self, module: str, shape: Shape) -> Stored:
        """Checks a module against its logical shape; raises a `UserError` that names what is missing or wrong."""

    @abc.abstractmethod
    def _read_module(self, module: str) -> Logical:
        """A module's logical weight."""


_LAYER_MODULES = {
    "attention_norm": "input_layernorm",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/down": "mlp.down_proj",
}
_OTHER_MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_BIAS = ".bias"


def module_shapes(config: LlamaConfig, path: str, shape: Shape, holds: Callable[[str], bool]) -> dict[str, Shape]:
    """Hugging Face's modules, with logical shapes, that make up a path of `parameter_shapes`; the name of a bias says so."""
    part, _, kind = path.rpartition("/")
    suffix = _BIAS if kind == "bias" else ""
    if part in _OTHER_MODULES:
        return {_OTHER_MODULES[part] + suffix: shape}
    layer, _, part = part.partition("/")
    prefix, names = f"model.layers.{layer.removeprefix('layers_')}.", _LAYER_MODULES | dict(FAMILIES[config.family].names)
    if part in ("attention/q_norm", "attention/k_norm") and config.qk_norm == "each":
        name, heads = part.removeprefix("attention/").replace("norm", "layernorm"), shape[0] // config.head_dim
        return {f"{prefix}self_attn.{name}.norms.{head}": (config.head_dim,) for head in range(heads)}
    if part in names:
        return {prefix + names[part] + suffix: shape}
    kv_features = config.num_kv_heads * config.head_dim
    if part == "attention/qkv":
        fused = "self_attn.qkv_proj"
        features = {"self_attn.q_proj": config.num_heads * config.head_dim, "self_attn.k_proj": kv_features,
                    "self_attn.v_proj": kv_features}
    else:
        fused = "mlp.gate_up_proj"
        features = {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size}
    if holds(prefix + fused):
        return {prefix + fused + suffix: shape}
    return {prefix + name + suffix: (*shape[:-1], width) for name, width in features.items()}


def tensor_name(module: str) -> str:
    """The tensor that holds a module of `module_shapes` where it is not quantised."""
    return module if module.endswith(_BIAS) else f"{module}.weight"


def as_computed(config: LlamaConfig, path: str, logical: Logical) -> Logical:
    """A weight as the network takes it: rope turns halves of a whole head there, and a norm's weight is not less one.

    The dims of every head of q and k are put into `config.head_order`, which leaves their products as they are.
    """
    family, order = FAMILIES[config.family], head_order(config)
    if family.offset_norms and path.endswith("/scale"):
        logical = np.asarray(logical, np.float32) + 1
    if order is None or not path.partition("/")[2].startswith(("attention/qkv/", "attention/q_norm/", "attention/k_norm/")):
        return logical
    assert not isinstance(logical, Quantised)  # `QuantisedReader` refuses such a family
    turned, shape = (config.num_heads + config.num_kv_heads) * config.head_dim, logical.shape
    values = logical[..., :turned] if "/qkv/" in path else logical
    heads = values.reshape(*shape[:-1], -1, config.head_dim)[..., order]
    return np.concatenate([heads.reshape(values.shape), logical[..., values.shape[-1]:]], axis=-1)


def _concatenate(parts: Sequence[Logical]) -> Logical:
    if isinstance(parts[0], Quantised):
        return type(parts[0]).beside(parts)
    return np.concatenate(parts, axis=-1)


def sha256(path: pathlib.Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
