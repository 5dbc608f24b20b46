"""Hugging Face directories: config.json, safetensors, tokenizer files."""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Sequence

import numpy as np

from checkpoints_tools.readers.base import ModuleReader, Shape, Stored, tensor_name
from checkpoints_tools.readers.files.rotation_file import find_rotation
from checkpoints_tools.readers.files.safetensors_files import SafetensorsFiles
from checkpoints_tools.readers.files.tensor_files import TensorFiles
from checkpoints_tools.readers.files.torch_files import TorchFiles
from checkpoints_tools.readers.files.weight_files import ROTATION_FILES, find_weight_files, shown
from specmq_jax.errors import UserError
from specmq_jax.json_files import read_json
from specmq_jax.network.config import LlamaConfig
from specmq_jax.tokenizer_files import TOKENIZER_FILES

_CONFIGS = ("config.json", "quantize_config.json")
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_GENERATED = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$")


def open_tensors(directory: pathlib.Path, named: str | None = None) -> TensorFiles:
    """The tensors of a directory; `named` as in `find_weight_files`.

    Raises:
      UserError: what `find_weight_files`, `SafetensorsFiles` and `TorchFiles` raise.
    """
    weights = find_weight_files(directory, named)
    kind = SafetensorsFiles if weights.files[0].suffix == ".safetensors" else TorchFiles
    return kind(directory, weights)


class HuggingFaceReader(ModuleReader):
    """A directory as transformers' `save_pretrained` writes it, in fp32, fp16 or bf16.

    `tensors` are the directory's, where they have been opened.

    Raises:
      UserError: an unsupported architecture; a file or tensor that is missing, truncated, unknown or misshapen.
    """

    kind, _precisions = "Hugging Face", _PRECISIONS

    def __init__(self, directory: pathlib.Path, tensors: TensorFiles | None = None):
        self.location = directory
        config = read_json(directory / "config.json")
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        self.llama = LlamaConfig.from_hf(config)
        self._check_model()
        self._tensors = tensors or open_tensors(directory)
        self.files = self._tensors.files
        self.tokenizer = find_tokenizer(directory)
        self.rotation_file = find_rotation(directory)
        self._expected: set[str] = set()
        if self.llama.tie_embeddings:
            self._untie_other_head()
        self._locate()
        self._refuse_unknown_tensors()
        self._check_values()
        self.formats = self._find_formats()

    @property
    def inputs(self) -> Sequence[pathlib.Path]:
        others = (*_CONFIGS, *TOKENIZER_FILES, *ROTATION_FILES)
        found = [*self.location.glob("*.index.json"), *(self.location / name for name in others)]
        return [*self.files, *(file for file in found if file.is_file())]

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        copy_tokenizer(self.location, directory)

    def _untie_other_head(self) -> None:
        """Takes an lm_head that the files hold beside a tied embedding, as transformers does where the two differ."""
        if not self._holds("lm_head"):
            return
        if self._is_embedding(_HEAD):
            self._expected.add(_HEAD)
            return
        self.llama = dataclasses.replace(self.llama, tie_embeddings=False)
        self.config["tie_word_embeddings"] = False
        self.notes = (f"{self.location} says that the embedding table serves as lm_head (tie_word_embeddings), and holds an "
                      "lm_head of its own that differs from it; that one is used, as transformers does",)

    def _is_embedding(self, name: str) -> bool:
        tensors = self._tensors
        if not {name, _EMBEDDING} <= tensors.headers.keys():
            return False
        (one, other), types = (tensors.headers[key] for key in (name, _EMBEDDING)), set(_PRECISIONS)
        return (one.type in types and other.type in types and one.shape == other.shape
                and np.array_equal(tensors.read(name), tensors.read(_EMBEDDING)))

    def _check_model(self) -> None:
        """What can't be read of some families."""

    def _check_values(self) -> None:
        """What can't be told from the headers."""

    def _holds(self, module: str) -> bool:
        return f"{module}.weight" in self._tensors.headers

    def _check(self, module: str, shape: Shape) -> Stored:
        stored_shape = shape if is_unturned(module, shape) else shape[::-1]
        name = tensor_name(module)
        header = self._tensors.header(name, stored_shape, tuple(_PRECISIONS))
        self._expected.add(name)
        return Stored(header.type, header.nbytes)

    def _read_module(self, module: str) -> np.ndarray:
        values = self._tensors.read(tensor_name(module))
        return values if is_unturned(module, values.shape) else values.T

    def _refuse_unknown_tensors(self) -> None:
        for name in sorted(self._tensors.headers.keys() - self._expected):
            if _GENERATED.search(name):
                continue
            raise UserError(f"{self.location} holds the tensor {shown(name)}, which a model of type "
                            f"{self.llama.family} with {self.llama.num_layers} layers does not use")


def is_unturned(module: str, shape: Shape) -> bool:
    """Whether a file holds the module as its logical weight; linear layers are held as [out, in]."""
    return len(shape) == 1 or module == "model.embed_tokens"


def find_tokenizer(directory: pathlib.Path) -> str | None:
    """The name of the file that holds the directory's tokenizer, None without one."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return next((name for name in names if (directory / name).is_file()), None)


def copy_tokenizer(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Copies the tokenizer files and generation_config.json that `source` has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
