"""The entry point of every command.

Exit statuses of a command:

- 0: it did what was asked for, or --help or --version.
- 1: a fault of the program, in one line; --debug shows where it lies.
- 2: a mistake or a machine that the user can mend, in one line.
- 130, 143, 129: it was interrupted by Ctrl-C, or terminated by SIGTERM or SIGHUP, and removed what was half written. A second
  Ctrl-C ends it sooner.
- 141: the program that read its output has ended.
"""

import gc
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from specmq_jax.commands import command_help, flag_values, interrupts
from specmq_jax.commands.explanations import explained
from specmq_jax.errors import UserError

flags.DEFINE_bool("debug", False, "Show the traceback of an error, too.")
_FAULT, _MISTAKE, _NO_READER = 1, 2, 141
_PLACES = ("specmq_jax", "experiments", "checkpoints_tools", "pallas_kernels")


def run(main: Callable[[Sequence[str]], None], *, unused: str = "--help lists the flags of this command") -> None:
    """Runs `main(argv)` as a command and ends the process; the module's docstring lists the exit statuses.

    Args:
      main: takes what is no flag, behind the program's name.
      unused: why a flag is refused that only other commands know: one that is no key flag of the main module.
    """
    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        flag_values.check(argv, unused)
        main(argv)
        sys.stdout.flush()

    leaving = interrupts.Leaving()
    try:
        interrupts.raise_in_main()
        _prepare_streams()
        app.run(guarded, flags_parser=_parse_flags)
    except BaseException as error:
        interrupts.end_at_once()
        status = _tell(error)
    if status:
        gc.collect()  # what still holds something half written lets it go
    _close_output()
    interrupts.ignore_at_exit()
    leaving.at_once(status)
    sys.exit(status)


def _tell(error: BaseException) -> int:
    """Says what ended a command, in one line if that is no success, and returns the exit status."""
    signalled = interrupts.status(error)
    if signalled is not None:
        _say(interrupts.word(signalled))
        return signalled
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # rich raises SystemExit for it
        return _NO_READER
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else _FAULT
    if flags.FLAGS["debug"].value:
        traceback.print_exception(error)
    mistake = error if isinstance(error, UserError) else explained(error)
    if mistake is not None:
        _say(f"error: {mistake}")
        return _MISTAKE
    _say(f"internal error: {_described(error)}; --debug shows more; please report it")
    return _FAULT


def _described(error: BaseException) -> str:
    """The error in one line, with the innermost place of it in this project."""
    text = " ".join(str(error).split())[:300]
    places = [frame for frame in traceback.extract_tb(error.__traceback__)
              if pathlib.Path(frame.filename).parent.parts[-1:] and set(pathlib.Path(frame.filename).parts) & set(_PLACES)]
    place = f" ({pathlib.Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _say(text: str) -> None:
    """Writes one line to stderr, if anybody still reads it."""
    try:
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)
    except OSError:
        return


def _prepare_streams() -> None:
    """Makes text that a terminal's encoding can't hold, or that is no text, appear escaped rather than end the command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _close_output() -> None:
    """Writes what is buffered; what can't be written is given up, lest Python complains of it on its way out."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse_flags(argv: Sequence[str]) -> list[str]:
    command_help.define_flags(argv[1:])
    flag_values.check_encoding(argv)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:
        raise UserError(f"{error} (--help lists the flags)") from None
