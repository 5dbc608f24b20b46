"""Copies of the repository's EAGLE heads with other tensors and entries."""

import json

import numpy as np
from fakes import DATA
from safetensors.numpy import load_file, save_file

HEADS = {version: DATA / "eagle" / f"eagle{version}_head" for version in (2, 3)}
BASES = {2: DATA / "checkpoints" / "fp16", 3: DATA / "eagle" / "eagle3_base"}


def tensors_of(version):
    return load_file(HEADS[version] / "model.safetensors")


def settings_of(version):
    return json.loads((HEADS[version] / "config.json").read_text())


def write_head(directory, version, tensors=None, *, rename=None, absent=(), **settings):
    """The head of that version with these tensors and settings instead of its own.

    Args:
      tensors: to be added or replaced, None for one to be taken away.
      rename: gives every tensor its name.
      absent: settings to be taken away.
    """
    directory.mkdir(exist_ok=True)
    config = {key: value for key, value in (settings_of(version) | settings).items() if key not in absent}
    (directory / "config.json").write_text(json.dumps(config))
    found = tensors_of(version) | (tensors or {})
    save_file({rename(name) if rename else name: np.ascontiguousarray(value) for name, value in found.items()
               if value is not None}, directory / "model.safetensors")
    return directory
