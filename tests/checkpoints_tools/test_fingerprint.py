"""A conversion in the cache is of the very files that its source has."""

import os

import numpy as np
import pytest
from sources import TINY, random_tensors, write_gguf, write_hf

from checkpoints_tools.conversion import fingerprint, prepare
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.files.rotation_file import save_rotation
from specmq_jax.tokenizer_files import TOKENIZER_FILES


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "model.safetensors.index.json", *TOKENIZER_FILES])
def test_a_change_of_any_small_file_is_another_source(tmp_path, name):
    write_hf(tmp_path / "source", shards=2)
    file = tmp_path / "source" / name
    if not file.exists():
        before = fingerprint(open_source(tmp_path / "source"))
        file.write_text(" {}" if name == "quantize_config.json" else "one")
        assert fingerprint(open_source(tmp_path / "source")) != before
    found = file.stat()
    before = fingerprint(open_source(tmp_path / "source"))
    content = file.read_text()
    file.write_text(content.replace(" ", "\n", 1) if name.endswith(("config.json", "index.json")) and " " in content else "two")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert file.stat().st_size == found.st_size
    assert fingerprint(open_source(tmp_path / "source")) != before


def test_a_change_of_the_weights_or_the_rotation_is_another_source(tmp_path):
    write_hf(tmp_path / "source")
    seen = {fingerprint(open_source(tmp_path / "source"))}
    write_hf(tmp_path / "source", tensors=random_tensors(TINY, seed=1))
    seen.add(fingerprint(open_source(tmp_path / "source")))
    save_rotation(tmp_path / "source", np.eye(64, dtype=np.float32))
    seen.add(fingerprint(open_source(tmp_path / "source")))
    save_rotation(tmp_path / "source", -np.eye(64, dtype=np.float32))
    seen.add(fingerprint(open_source(tmp_path / "source")))
    assert len(seen) == 4


def test_a_ggufs_change_is_another_source(tmp_path):
    seen = set()
    for seed in (0, 1):
        write_gguf(tmp_path / "model.gguf", TINY, random_tensors(TINY, seed=seed))
        seen.add(fingerprint(open_source(tmp_path / "model.gguf")))
    assert len(seen) == 2


def test_prepare_takes_the_files_of_today(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path / "cache"))
    write_hf(tmp_path / "source")
    for text in ("one", "two"):
        (tmp_path / "source" / "chat_template.jinja").write_text(text)
        assert (prepare(tmp_path / "source") / "chat_template.jinja").read_text() == text
    assert prepare(tmp_path / "source") == prepare(tmp_path / "source")
