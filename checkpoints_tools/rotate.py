"""Rotates a model into a basis that quantises better: python -m checkpoints_tools.rotate SRC DST [--seed=N] [--precision=NAME]

SRC is anything that checkpoints_tools.convert reads whose weights are not quantised. The function stays the same, and no
rotation is left to be done at run time (QuaRot, arXiv:2404.00456, its offline part): with an orthogonal Q the residual stream
x becomes x Q, and a Hadamard matrix turns every head between v and o. DST also holds Q, by which EAGLE heads are adapted.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from checkpoints_tools.arguments import arguments
from checkpoints_tools.conversion import target_formats, write
from checkpoints_tools.readers import open_source
from checkpoints_tools.rotation.rotated import RotatedReader, check_rotatable, random_rotation
from specmq_jax import formats
from specmq_jax.commands import entry
from specmq_jax.files import check_destination


def rotate(source: str | pathlib.Path, destination: str | pathlib.Path, *, seed: int = 0, precision: str | None = None
           ) -> pathlib.Path:
    """Writes a rotated copy of `source` as a native checkpoint named `destination`, which it returns.

    Args:
      source: anything `readers.open_source` opens whose weights are dense.
      destination: must not exist, or be an empty directory.
      seed: of the rotation.
      precision: of the layers' linear weights, by round-to-nearest; None keeps the source's.

    Raises:
      UserError: what the reader finds wrong, quantised or rotated weights, an unknown precision, a destination that is taken.
    """
    wanted = formats.get(precision) if precision else None
    destination = pathlib.Path(destination)
    check_destination(destination)
    reader = open_source(source)
    check_rotatable(reader)
    rotated = RotatedReader(reader, random_rotation(reader.llama.hidden_size, seed), seed)
    return write(rotated, destination, target_formats(rotated.formats, wanted))


def main(argv: Sequence[str]) -> None:
    source, destination = arguments(argv, "python -m checkpoints_tools.rotate SRC DST [--seed=N] [--precision=NAME]", 2)
    print(rotate(source, destination, seed=flags.FLAGS.seed, precision=flags.FLAGS.precision))


if __name__ == "__main__":
    flags.DEFINE_integer("seed", 0, "Of the rotation's random signs.", lower_bound=0)
    flags.DEFINE_string("precision", None, "Precision of the layers' linear weights, made by round-to-nearest behind the "
                        f"rotation; one of {', '.join(formats.names())}. Default: the source's.")
    entry.run(main)
