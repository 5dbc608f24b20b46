"""What --help and --version of every command print."""

import sys
import textwrap
from collections.abc import Callable, Sequence

from absl import flags

from specmq_jax.commands import flag_values
from specmq_jax.commands.version import NAME, version

_WIDTH, _INDENT = 100, 6


class _Answered(flags.BooleanFlag):
    """A flag that prints a text in place of what the command does."""

    def __init__(self, name: str, text: str, say: Callable[[], str], short_name: str | None = None):
        super().__init__(name, False, text, short_name=short_name, allow_override=True)
        self._say = say

    def parse(self, argument: str | bool) -> None:
        super().parse(argument)
        if self.value:
            print(self._say())
            sys.exit(0)


def define_flags(arguments: Sequence[str]) -> None:
    """Declares --help, in place of absl's, which leaves flags out and ends with status 1, and --version.

    Where a command has a --version=VALUE of its own, `arguments` that are --version alone still ask for the program's.
    """
    for name in ("help", "helpshort", "helpfull"):
        flags.DEFINE_flag(_Answered(name, "Show this text.", page, {"help": "?", "helpshort": "h"}.get(name)))
    if "version" not in flags.FLAGS or list(arguments) == ["--version"]:
        flags.DEFINE_flag(_Answered("version", "Show the version.", lambda: f"{NAME} {version()}"))


def page() -> str:
    """What the main module says of itself, and each of its flags with its default."""
    entries = [_entry(flag) for flag in flag_values.key_flags()]
    entries += [_text("--help", "Show this text."), _text("--version", "Show the program's version.")]
    return f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nFlags:\n\n" + "\n".join(entries)


def _entry(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    about = [flag.help]
    if isinstance(flag.parser, flags.EnumParser):
        about = [flag.help.partition(">: ")[2]]  # absl puts the values first
        about.append(f"One of {', '.join(flag.parser.enum_values)}.")
    elif not flag.boolean and flag.parser.syntactic_help:
        about.append(f"{flag.parser.syntactic_help[:1].upper()}{flag.parser.syntactic_help[1:]}.")
    if flag.default not in (None, []) and "Default" not in flag.help:
        about.append(f"Default: {_default(flag)}.")
    return _text(name, " ".join(about))


def _default(flag: flags.Flag) -> str:
    if flag.boolean:
        return "yes" if flag.default else "no"
    return ",".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)


def _text(name: str, about: str) -> str:
    indent = " " * _INDENT
    return f"  {name}\n" + textwrap.fill(about, _WIDTH, initial_indent=indent, subsequent_indent=indent,
                                         break_long_words=False, break_on_hyphens=False)
