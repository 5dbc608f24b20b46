"""Quantises a model: python -m checkpoints_tools.quantize SRC DST --precision=NAME [--algorithm=gptq --calibration=FILE]

SRC is anything that checkpoints_tools.convert reads, a native checkpoint included. Round-to-nearest looks at the weights alone;
GPTQ (arXiv:2210.17323) and --smooth (SmoothQuant, arXiv:2211.10438) look at what the model makes of a calibration text, plain
or JSON lines ({"text": text}, or MT-Bench's {"turns": [text, ...]}). --rotate rotates the weights first (QuaRot,
arXiv:2404.00456). A killed run that looks at a text goes on behind its last finished layer when it is started again.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from checkpoints_tools.arguments import arguments, define_head_precision
from checkpoints_tools.conversion import check_changed, check_head, target_formats, write
from checkpoints_tools.quantizers.calibration import CalibrationFile
from checkpoints_tools.quantizers.gptq import Gptq
from checkpoints_tools.quantizers.layerwise import Quantiser, Recipe
from checkpoints_tools.quantizers.smooth import INPUTS, Smoothing
from checkpoints_tools.quantizers.stages import CALIBRATED
from checkpoints_tools.readers import Reader, open_source
from checkpoints_tools.rotation.rotated import RotatedReader, random_rotation
from specmq_jax import formats
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination, scratch
from specmq_jax.formats import DenseFormat
from specmq_jax.loading.contents import checkpoint_digest, json_digest
from specmq_jax.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_USAGE = "python -m checkpoints_tools.quantize SRC DST --precision=NAME"


def quantize(source: str | pathlib.Path, destination: str | pathlib.Path, precision: str, *, recipe: Recipe | None = None,
             calibration: CalibrationFile | None = None, rotation_seed: int | None = None,
             head_precision: str | None = None) -> pathlib.Path:
    """Writes `source` as a native checkpoint of another precision named `destination`, which it returns.

    Args:
      source: anything `readers.open_source` opens; its weights are dense where a recipe or a rotation is given.
      destination: must not exist, or be an empty directory.
      precision: of the layers' linear weights.
      recipe: how they are quantised; None for round-to-nearest.
      calibration: the text that a recipe looks at.
      rotation_seed: rotates the model first, by a matrix drawn with this seed.
      head_precision: of lm_head, by round-to-nearest; None leaves it dense.

    Raises:
      UserError: what the reader or the text's reader finds wrong, an unknown precision, a destination that is taken, a recipe
        that does not fit the rest, or an unfinished run with other settings beside the destination.
    """
    wanted, destination, recipe = formats.get(precision), pathlib.Path(destination), recipe or Recipe()
    looks = recipe.gptq is not None or recipe.smoothing is not None
    check_destination(destination)
    if recipe.gptq and isinstance(wanted, DenseFormat):
        raise UserError(f"{wanted.name} weights are not quantised, so GPTQ has nothing to do; choose another --precision")
    if looks and calibration is None:
        raise UserError("GPTQ and smoothing look at a calibration text; give one with --calibration=FILE")
    if calibration and not looks:
        raise UserError("rounding to nearest looks at no calibration text; add --algorithm=gptq or --smooth, or leave "
                        "--calibration out")
    reader = open_source(source)
    if looks and not isinstance(reader.formats.linear, DenseFormat):
        raise UserError(f"{source} holds {reader.formats.linear.name} weights, which would be rounded a second time; give the "
                        "model that they were made from")
    if looks:
        reader.llama.require("quantising by a calibration text", CALIBRATED)
    made = recipe.describe() | {"rotation_seed": rotation_seed}
    source_reader = reader
    if rotation_seed is not None:
        reader = RotatedReader(reader, random_rotation(reader.llama.hidden_size, rotation_seed), rotation_seed)
    head = formats.get(head_precision) if head_precision else None
    target = target_formats(reader.formats, wanted, head)
    check_head(reader, head)
    if not looks:
        check_changed(reader, wanted, head)
        return write(reader, destination, target, quantisation=made)
    text = calibration.read(_tokenizer(reader), reader.llama)
    digests = reader.digests()
    return Quantiser(reader, target, recipe, text).write(destination, made | {"calibration": text.describe()},
                                                         content=_content(source_reader, digests), digests=digests)


def _content(reader: Reader, digests: Mapping[str, str]) -> str:
    """The digest of all that a model's weights are made from, wherever it lies; `digests` are the reader's."""
    if reader.kind == "native":
        return checkpoint_digest(reader.location)
    return json_digest([reader.config, dict(digests)])


def _tokenizer(reader: Reader) -> "Tokenizer":
    if reader.tokenizer is None:
        raise UserError(f"{reader.location} has no tokenizer, which a calibration text needs")
    with scratch("specmq_tokenizer") as directory:
        reader.save_tokenizer(directory)
        return load_tokenizer(directory)


def main(argv: Sequence[str]) -> None:
    source, destination = arguments(argv, _USAGE, 2)
    given = flags.FLAGS
    if not given.precision:
        raise UserError(f"--precision is missing; choose one of {', '.join(formats.names())}; usage: {_USAGE}")
    gptq = Gptq(act_order=given.act_order, damping=given.damping, search=given.scales == "searched")
    recipe = Recipe(gptq=gptq if given.algorithm == "gptq" else None, smoothing=_smoothing(given.smooth, given.smooth_inputs))
    calibration = CalibrationFile(path=pathlib.Path(given.calibration), length=given.calibration_length,
                                  count=given.calibration_count) if given.calibration else None
    print(quantize(source, destination, given.precision, recipe=recipe, calibration=calibration,
                   rotation_seed=given.rotation_seed if given.rotate else None, head_precision=given.head_precision))


def _smoothing(alpha: str | None, inputs: Sequence[str]) -> Smoothing | None:
    if alpha is None:
        return None
    if unknown := [name for name in inputs if name not in INPUTS]:
        raise UserError(f"--smooth_inputs={','.join(inputs)}: {unknown[0]!r} is not known; choose from {', '.join(INPUTS)}")
    if alpha == "auto":
        return Smoothing(alpha=None, inputs=tuple(inputs))
    try:
        value = float(alpha)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"--smooth={alpha} is neither 'auto' nor a number from 0 to 1")
    return Smoothing(alpha=value, inputs=tuple(inputs))


def _define_flags() -> None:
    define_head_precision()
    flags.declare_key_flag("head_precision")
    flags.DEFINE_string("precision", None, "Precision of the layers' linear weights; one of "
                        f"{', '.join(formats.names())}.")
    flags.DEFINE_enum("algorithm", "rtn", ["rtn", "gptq"], "How codes are chosen: rounded to nearest, or by GPTQ.")
    flags.DEFINE_boolean("act_order", True, "GPTQ rounds the inputs of largest mean square first, in groups that stay as they "
                         "are stored; else by number, with scales from the weights as they have become.")
    flags.DEFINE_float("damping", 0.01, "GPTQ adds this share of the Hessian's mean diagonal to its diagonal.", lower_bound=0,
                       upper_bound=1)
    flags.DEFINE_enum("scales", "searched", ["searched", "absmax"], "GPTQ's scales: of least error, or of the full range.")
    flags.DEFINE_string("smooth", None, "SmoothQuant's alpha, from 0 to 1, or 'auto' to search for it in every layer.")
    flags.DEFINE_list("smooth_inputs", list(INPUTS), f"Layers whose inputs are smoothed, from {', '.join(INPUTS)}.")
    flags.DEFINE_boolean("rotate", False, "Rotate the weights first; the matrix is saved with the checkpoint.")
    flags.DEFINE_integer("rotation_seed", 0, "Seed of the rotation.", lower_bound=0)
    flags.DEFINE_string("calibration", None, "Text file, or .jsonl file with a text or turns in each line.")
    flags.DEFINE_integer("calibration_length", None, "Tokens of a calibration sequence. Default: 2048, or the model's "
                         "positions if those are fewer.", lower_bound=1)
    flags.DEFINE_integer("calibration_count", 128, "Calibration sequences at the most, spread over the text.", lower_bound=1)


if __name__ == "__main__":
    _define_flags()
    entry.run(main)
