"""The one exception a user's mistake raises, and the entry point that prints it in one line."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error instead of one line.")


class UserError(Exception):
    """A mistake the user can mend: the message says what was found, what was expected and what to do."""


class NotFiniteError(UserError):
    """A model's state at a token is not finite, so that nothing can be drawn behind it.

    Attributes:
      position: of the token, counted from 0 in prompt and answer.
      tokens: new tokens before the answer ended, all of them drawn from finite states.
    """

    def __init__(self, message: str, *, position: int, tokens: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.position, self.tokens = position, tuple(tokens)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(argv)` under absl; a `UserError` or Ctrl-C ends in one line on stderr, exit code 2 or 130."""

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except UserError as error:
            if _DEBUG.value:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
