"""Makes a native checkpoint: python -m checkpoints_tools.convert SRC DST [--precision=NAME] [--head_precision=NAME]

SRC is a Hugging Face directory, plain or quantised by GPTQ, AutoRound, compressed-tensors, QQQ, QServe or in SpecMQuant's
Marlin layout, a GGUF file, a native checkpoint, or a name on the Hugging Face hub.
Without --precision the checkpoint keeps the source's precision; GGUF's quantised types become fp16.
"""

from collections.abc import Sequence

from absl import flags

from checkpoints_tools.arguments import arguments, define_head_precision
from checkpoints_tools.conversion import convert
from specmq_jax import formats
from specmq_jax.commands import entry


def main(argv: Sequence[str]) -> None:
    usage = "python -m checkpoints_tools.convert SRC DST [--precision=NAME] [--head_precision=NAME]"
    source, destination = arguments(argv, usage, 2)
    print(convert(source, destination, flags.FLAGS.precision, flags.FLAGS.head_precision))


if __name__ == "__main__":
    flags.DEFINE_string("precision", None, "Precision of the layers' linear weights, made by round-to-nearest; one of "
                        f"{', '.join(formats.names())}. Default: the source's.")
    define_head_precision()
    entry.run(main)
