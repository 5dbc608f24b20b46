"""Files and directories appear whole or not at all, and what killed processes left of them goes."""

import errno
import os
import pathlib
import signal
import stat
import subprocess
import sys

import pytest

from specmq_jax import files
from specmq_jax.errors import UserError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
HOLD = """
import contextlib, pathlib, sys, time
from specmq_jax import files
with files.staged(sys.argv[1]) as directory, files.written(sys.argv[2]) as file:
    (directory / "a").write_text("half")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing the directory `made` and the file `made.json`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "made", tmp_path / "made.json"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def partials(directory):
    return sorted(path.name for path in directory.glob(".*.partial"))


def test_a_directory_and_a_file_appear_when_they_are_done(tmp_path):
    with files.staged(tmp_path / "deep" / "made") as directory, files.written(tmp_path / "file") as file:
        (directory / "a").write_text("1")
        file.write_text("2")
        assert not (tmp_path / "deep" / "made").exists() and not (tmp_path / "file").exists()
    assert (tmp_path / "deep" / "made" / "a").read_text() == "1" and (tmp_path / "file").read_text() == "2"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "deep", "file", "made"]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_is_left_of_what_failed_and_a_former_file_stays(tmp_path, error):
    (tmp_path / "file").write_text("before")
    with pytest.raises(type(error)), files.staged(tmp_path / "made") as directory, files.written(tmp_path / "file") as file:
        (directory / "a").write_text("half")
        file.write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("error", [
    FULL, ValueError("RESOURCE_EXHAUSTED: Failed to write 3 bytes to file 4: No space left on device [os_error_code='28']"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_told_whoever_finds_it(tmp_path, error):
    for writing in (files.staged, files.written):
        with pytest.raises(UserError, match=f"{tmp_path}/made can't be written: No space left on device; make room"), \
                writing(tmp_path / "made"):
            raise error
    assert not os.listdir(tmp_path)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), files.staged(tmp_path / "made"):
        (tmp_path / "source").read_text()


def test_a_place_that_is_taken_or_none(tmp_path):
    (tmp_path / "file").write_text("x")
    for place, found in ((tmp_path, "is not empty"), (tmp_path / "file", "is not a directory"),
                         (tmp_path / "file" / "made", "can't be written: "),
                         (tmp_path / ("x" * 300), "can't be written: File name too long")):
        with pytest.raises(UserError, match=found), files.staged(place):
            pass
    for place, found in ((tmp_path, "is a directory"), (tmp_path / "none" / "file", "No such file"),
                         (tmp_path / "file" / "made", "Not a directory")):
        with pytest.raises(UserError, match=found):
            files.put_text(place, "x")
    assert os.listdir(tmp_path) == ["file"]


def test_names_of_every_length_that_the_system_takes(tmp_path):
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        files.put_text(tmp_path / name, "x")
    assert len(os.listdir(tmp_path)) == 2


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.put_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "x"
    files.put_text("/dev/null", "x")
    assert stat.S_ISCHR(pathlib.Path("/dev/null").stat().st_mode)


def test_half_a_surrogate_pair_is_written_as_json_escapes_it(tmp_path):
    files.put_json(tmp_path / "file", {"a": "\udcff\u00e9"})
    assert (tmp_path / "file").read_text(encoding="utf-8") == '{\n  "a": "\\udcff\u00e9"\n}\n'


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(tmp_path, holder):
    (tmp_path / ".made.0123abcd.partial").mkdir()
    (tmp_path / ".made.0123abcd.partial" / "a").write_text("left by a killed process")
    (tmp_path / ".other.0123abcd.partial").mkdir()
    held = set(partials(tmp_path)) - {".made.0123abcd.partial"}
    assert len(held) == 3
    files.put_text(tmp_path / "made.json", "{}")
    with files.staged(tmp_path / "made"):
        pass
    assert set(partials(tmp_path)) == held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / "made").rmdir()
    files.put_text(tmp_path / "made.json", "{}")
    with files.staged(tmp_path / "made"):
        pass
    assert partials(tmp_path) == [".other.0123abcd.partial"]


def test_scratch_goes_with_its_context_or_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / ".work.0123abcd.partial").mkdir()
    with files.scratch("work") as directory:
        assert os.listdir(tmp_path) == [directory.name]
        (directory / "a").write_text("x")
    assert not os.listdir(tmp_path)
