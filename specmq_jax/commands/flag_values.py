"""What holds for the values of all flags, which their declarations can't say."""

import math
from collections.abc import Iterable, Sequence

from absl import flags

from specmq_jax.errors import UserError

_PACKAGES = ("experiments", "checkpoints_tools", "pallas_kernels", "specmq_jax")


def check(argv: Sequence[str], unused: str) -> None:
    """Checks the flags that were given.

    Args:
      argv: the program's name, behind which its arguments stand.
      unused: said of a flag that is no key flag of the main module.

    Raises:
      UserError: a flag of other commands, an empty text or entry, or a number that is none.
    """
    key = {flag.name for flag in key_flags()}
    for name in own_flags():
        flag = flags.FLAGS[name]
        if flag.present and name not in key:
            raise UserError(f"--{name} has no use here: {unused}")
        if flag.present:
            check_value(name, flag.value)
    if "" in argv[1:]:
        raise UserError("an argument is empty; give a value, or leave it out")


def check_value(name: str, value: object) -> None:
    """Raises a `UserError` for a flag's value that is empty, holds empty entries or is no finite number."""
    if value == "":
        raise UserError(f"--{name} is empty; give a value, or leave the flag out")
    if isinstance(value, list) and (not value or "" in value):
        raise UserError(f"--{name}={','.join(map(str, value))} has an empty entry; expected a list with commas between its "
                        "entries")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"--{name}={number} is no finite number")


def check_encoding(argv: Iterable[str]) -> None:
    """Raises a `UserError` for an argument whose bytes are no text in the encoding of this machine."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"the argument {ascii(argument)} is no text in this terminal's encoding; rename the file, or set "
                            "PYTHONUTF8=1 if the name is UTF-8") from None


def key_flags() -> list[flags.Flag]:
    """The flags that the running command takes, by name; --debug is one of each command."""
    found = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(_main_module())}
    return [flag for _, flag in sorted((found | {"debug": flags.FLAGS["debug"]}).items())]


def own_flags() -> list[str]:
    """Names of all flags that modules of this project have declared."""
    by_module = flags.FLAGS.flags_by_module_dict()
    main = _main_module()
    return sorted(flag.name for module, found in by_module.items() for flag in found
                  if module == main or module.split(".")[0] in _PACKAGES)


def _main_module() -> str:
    """As absl names the module that Python runs."""
    import sys

    return sys.argv[0]
