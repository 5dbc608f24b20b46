"""Quantises by round-to-nearest: python -m checkpoints_tools.quantize SRC DST --precision=w4a16-g64

SRC is anything that checkpoints_tools.convert reads, a native checkpoint included.
"""

from collections.abc import Sequence

from absl import flags

from checkpoints_tools.convert import arguments, convert
from specmq_jax import errors, formats
from specmq_jax.errors import UserError

_USAGE = "python -m checkpoints_tools.quantize SRC DST --precision=NAME"


def main(argv: Sequence[str]) -> None:
    source, destination = arguments(argv, _USAGE, 2)
    if not flags.FLAGS.precision:
        raise UserError(f"--precision is missing; choose one of {', '.join(formats.names())}; usage: {_USAGE}")
    print(convert(source, destination, flags.FLAGS.precision))


if __name__ == "__main__":
    flags.DEFINE_string("precision", None, "Precision of the layers' linear weights; one of "
                        f"{', '.join(formats.names())}.")
    errors.run(main)
