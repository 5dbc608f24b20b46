"""Checkpoints named as on the Hugging Face hub."""

import pathlib
import re

import huggingface_hub
from huggingface_hub import errors

from checkpoints_tools.readers.files.weight_files import ROTATION_FILES
from specmq_jax.errors import UserError
from specmq_jax.tokenizer_files import TOKENIZER_FILES

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["config.json", "quantize_config.json", "*.safetensors", "*.safetensors.index.json", "rotation.*", *TOKENIZER_FILES]
_PICKLED = ["quant_model.pt", "pytorch_model*.bin", "pytorch_model.bin.index.json"]


def is_hub_name(source: str) -> bool:
    """Whether `source` has the form organisation/name."""
    return _NAME.fullmatch(source) is not None


def local(source: str) -> pathlib.Path:
    """The path that `source` names, or the directory of a hub repository's files where no such path exists.

    Raises:
      UserError: as `download`.
    """
    path = pathlib.Path(source)
    return download(source) if not path.exists() and is_hub_name(source) else path


def download(name: str) -> pathlib.Path:
    """The directory of a hub repository's files, from the hub's own cache where they are there already.

    Raises:
      UserError: no such repository, no access to it, or no network.
    """
    try:
        path = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
        if any(file.name not in ROTATION_FILES for file in path.glob("*.safetensors")):
            return path
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *_PICKLED]))
    except errors.GatedRepoError:
        raise UserError(f"{name} on the Hugging Face hub asks for consent; accept its terms there and log in with "
                        "`hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name} is neither a local path nor a repository on the Hugging Face hub") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is no local path, and the Hugging Face hub could not be reached ({reason[:120]}); give "
                        "a local directory or GGUF file") from None
