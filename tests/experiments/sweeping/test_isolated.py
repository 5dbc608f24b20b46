"""Work in a process of its own: what it tells arrives, and how it ends."""

import errno
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.sweeping import isolated
from experiments.sweeping.isolated import ProcessEnded
from specmq_jax import files
from specmq_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]


def told(count, tell):
    for i in range(count):
        tell((os.getpid(), i))


def mistaken(tell):
    tell("begun")
    raise UserError("no such thing; choose another")


def killed(tell):
    tell("begun")
    os.kill(os.getpid(), signal.SIGKILL)


def faulty(tell):
    raise ZeroDivisionError("by chance")


def endless(tell):
    tell(os.getpid())
    time.sleep(600)


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_reports_come_in_order_from_another_process():
    found = list(isolated.reports(told, 3))
    assert [i for _, i in found] == [0, 1, 2]
    assert len({pid for pid, _ in found}) == 1 and found[0][0] != os.getpid()


def test_a_users_mistake_arrives_as_such():
    with pytest.raises(UserError, match="^no such thing; choose another$"):
        list(isolated.reports(mistaken))


@pytest.mark.parametrize(("work", "how"), [(killed, "ended by SIGKILL; the machine may have run out of memory"),
                                           (faulty, "ended with exit code 1")])
def test_an_early_end_is_told(work, how):
    with pytest.raises(ProcessEnded, match=how):
        list(isolated.reports(work))


def test_the_process_ends_when_nobody_listens():
    reports = isolated.reports(endless)
    pid = next(reports)
    reports.close()
    assert gone(pid)


def talkative(tell):
    while True:
        tell(os.getpid())


def test_a_process_that_is_telling_something_ends_without_a_traceback(capfd, monkeypatch):
    """Behind Ctrl-C the parent listens no longer, and a busy machine lets the process go on for a while."""
    ended, end = multiprocessing.context.SpawnProcess, multiprocessing.context.SpawnProcess.terminate
    monkeypatch.setattr(ended, "terminate", lambda process: (process.join(5), end(process)))
    reports = isolated.reports(talkative)
    next(reports)
    reports.close()
    assert capfd.readouterr().err == ""


def test_the_process_ends_when_its_parent_is_killed():
    code = ("import time, test_isolated\nreports = test_isolated.isolated.reports(test_isolated.endless)\n"
            "print(next(reports), flush=True)\ntime.sleep(600)")
    paths = os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)])
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": paths})
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(pid)


def half_written(place, tell):
    with files.staged(place) as directory:
        (directory / "a").write_text("half")
        tell("begun")
        time.sleep(600)


def test_what_the_process_has_half_written_goes_with_it(tmp_path):
    reports = isolated.reports(half_written, tmp_path / "made")
    assert next(reports) == "begun" and os.listdir(tmp_path)
    reports.close()
    assert not os.listdir(tmp_path)


def without_a_disk(tell):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a")


def test_what_the_machine_is_at_fault_for_arrives_as_a_mistake():
    with pytest.raises(UserError, match="^a can't be written: No space left on device"):
        list(isolated.reports(without_a_disk))


@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_ctrl_c_of_a_terminal_ends_both_in_one_line(seconds):
    code = ("import test_isolated\nfrom specmq_jax.commands import entry\n"
            "def main(argv):\n    print('begun', flush=True)\n    list(test_isolated.isolated.reports(test_isolated.endless))\n"
            "if __name__ == '__main__':\n    entry.run(main)")
    paths = os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)])
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": paths}, start_new_session=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)  # while the other process is importing, or at work
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told == "interrupted\n"
