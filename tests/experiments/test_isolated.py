"""Work in a process of its own: what it tells arrives, and how it ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import isolated
from experiments.isolated import ProcessEnded
from specmq_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


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
