"""The exceptions that a user's mistake raises."""

from collections.abc import Sequence


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
