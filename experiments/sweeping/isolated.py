"""Work in a process of its own, which reports while it works: the device memory that it took is free when it ends."""

import contextlib
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from specmq_jax.commands import explanations, interrupts
from specmq_jax.errors import UserError

_ENDING_SECONDS = 10
"""Time for a process to remove what it has half written."""
Tell = Callable[[Any], None]
"""How the work reports something, which must be picklable."""


class ProcessEnded(Exception):
    """The process ended before its work did; the message says how."""


def reports(work: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Yields what `work(*arguments, tell)` tells, as it comes. The process ends with the work, and with this iterator.

    Args:
      work: a function of a module.
      arguments: picklable.

    Raises:
      UserError: what the work raised.
      ProcessEnded: the process was killed, or the work raised something else, of which the process printed the traceback.
    """
    context = multiprocessing.get_context("spawn")  # a forked process would share a device that JAX has opened
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, arguments), daemon=True)
    with _interrupts_kept_from_children():
        process.start()
    sender.close()
    try:
        while True:
            try:
                told = receiver.recv()
            except EOFError:
                break
            if isinstance(told, UserError):
                raise told
            yield told
        process.join()
        if process.exitcode:
            raise ProcessEnded(_ending(process.exitcode))
    finally:
        receiver.close()
        process.terminate()
        process.join(_ENDING_SECONDS)
        process.kill()
        process.join()


@contextlib.contextmanager
def _interrupts_kept_from_children() -> Iterator[None]:
    """A child process inherits that Ctrl-C is blocked, so that it does not even end its imports."""
    multiprocessing.resource_tracker.ensure_running()  # which would let signals through again on its way
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(sender: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    interrupts.raise_in_main()  # the parent's SIGTERM, so that nothing half written stays
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tell = functools.partial(_tell, sender)
    try:
        work(*arguments, tell)
    except UserError as error:
        tell(error)
    except Exception as error:
        mistake = explanations.explained(error)
        if mistake is None:
            raise
        tell(mistake)


def _tell(sender: Connection, told: Any) -> None:
    """Sends it; ends the process where nobody listens any more, as behind the parent's Ctrl-C."""
    try:
        sender.send(told)
    except BrokenPipeError:
        sys.exit(1)


def _end_with_parent() -> None:
    """A parent that was killed ended nothing; what goes on without it would write into the files of the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ending(exit_code: int) -> str:
    if exit_code > 0:
        return f"the process ended with exit code {exit_code}; its last lines on stderr say why"
    name = signal.Signals(-exit_code).name
    return f"the process was ended by {name}" + ("; the machine may have run out of memory" if name == "SIGKILL" else "")
