"""What Ctrl-C and other signals do to a command, from its first import to its exit.

Importing this module readies a process that `python -m` has just started on one of the project's commands, and no other: there,
until the command runs, a signal ends it at once. The packages with commands import it first. While a command runs, signals are
exceptions in the main thread, so that what is half done is undone; behind that they end the process at once again.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

PACKAGES = ("experiments", "checkpoints_tools", "pallas_kernels")
"""Those with commands."""
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
    _WORDS[signal.SIGHUP] = "terminated"
_FIRST_STATUS = 128
"""Of the exit statuses of processes that a signal ended, as shells count them."""


class Terminated(SystemExit):
    """A signal other than Ctrl-C's ends the command; no library takes this exception for an error."""

    def __init__(self, number: int):
        super().__init__(_FIRST_STATUS + number)
        self.number = number


class Leaving:
    """Ends an interrupted process behind its last exit function, before Python takes apart what threads of a library still use.

    Exit functions run in the reverse order of their registration, so one of these is made before the command's work.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        atexit.register(self._leave)

    def at_once(self, status: int) -> None:
        """From here on the process ends so, if a signal is behind that exit status."""
        if status - _FIRST_STATUS in _WORDS:
            self._status = status

    def _leave(self) -> None:
        if self._status is not None:
            os._exit(self._status)


def is_starting() -> bool:
    """Whether `python -m` is importing the packages around one of the project's commands."""
    if sys.argv[:1] != ["-m"]:
        return False
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if argument in ("-W", "-X", "--check-hash-based-pycs"):
            next(arguments, None)
        elif argument[:1] == "-" and argument[1:2] not in ("-", "W", "X") and "m" in argument:
            name = argument.partition("m")[2] or next(arguments, "")
            return name.split(".")[0] in PACKAGES
    return False


def end_at_once() -> None:
    """From here on signals end the process, without any more of its code being run."""
    _handle(_end)


def ignore_at_exit() -> None:
    """The work is done, or undone: once all threads have ended, nothing changes the exit status any more.

    Python gives its signal handlers up long before the process ends.
    """
    atexit.register(_handle, signal.SIG_IGN)


def raise_in_main() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt in the main thread, and other signals are `Terminated`.

    One that is raised where Python can only report an exception, as in a finaliser, is raised again a moment later.
    """
    # asyncio stops its tasks in order on Ctrl-C, if it finds this handler
    _handle(_terminate)
    if signal.getsignal(signal.SIGINT) in (_end, _terminate):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _reported_again
    sys.excepthook = _in_one_line


def status(error: BaseException | None) -> int | None:
    """The exit status where a signal is behind an error, even one that a library made of it; None where none is."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Terminated):
            return _FIRST_STATUS + error.number
        if isinstance(error, KeyboardInterrupt) or isinstance(error, RuntimeError) and "KeyboardInterrupt" in str(error):
            return _FIRST_STATUS + signal.SIGINT
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def word(exit_status: int) -> str:
    """What is said of a command that a signal ended."""
    return _WORDS[signal.Signals(exit_status - _FIRST_STATUS)]


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _WORDS:
        # one that is ignored stays so, as under nohup
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _end, _terminate):
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    os.write(2, f"{_WORDS[signal.Signals(number)]}\n".encode())
    os._exit(_FIRST_STATUS + number)


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    raise Terminated(number)


def _reported_again(unraisable: "sys.UnraisableHookArgs") -> None:
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt | Terminated):
        # TensorStore's, to a task that has ended on the error of another write
        if str(error) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else error.number

    def send() -> None:
        time.sleep(0.01)  # once the place that swallows exceptions has been left
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def _in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Of what nobody catches. A library's thread may print errors that it has handed on to the main thread, too."""
    if threading.current_thread() is not threading.main_thread():
        return
    if (found := status(error)) is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(word(found), file=sys.stderr)


if is_starting():
    end_at_once()
