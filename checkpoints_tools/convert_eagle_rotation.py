"""Adapts an EAGLE head to the rotated copy of its target: python -m checkpoints_tools.convert_eagle_rotation --eagle=HEAD
--base=MODEL --rotation=ROTATION --output=DST

HEAD is a head in the official layout that was trained for MODEL, which is not rotated (anything checkpoints_tools.convert
reads). ROTATION is the checkpoint that was made from MODEL by checkpoints_tools.rotate, or the rotation.pth of another
toolkit. On the rotated model the head in DST drafts what HEAD drafts on MODEL.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import Float

from checkpoints_tools.arguments import arguments
from checkpoints_tools.readers import Reader, hub, open_source
from checkpoints_tools.readers.files.rotation_file import load_rotation
from checkpoints_tools.writers.shards import save_tensors
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination, put_json, staged
from specmq_jax.formats import dense_values
from specmq_jax.json_files import read_json
from specmq_jax.loading.head import outline_head
from specmq_jax.loading.head_checks import check_draft_ids, check_finite
from specmq_jax.loading.head_file import HeadFiles
from specmq_jax.loading.head_tensors import EMBED, FC, LM_HEAD, ROTATION
from specmq_jax.loading.model import Outline
from specmq_jax.network.eagle import ROTATED_TARGET, EagleConfig

_USAGE = "python -m checkpoints_tools.convert_eagle_rotation --eagle=HEAD --base=MODEL --rotation=ROTATION --output=DST"
_FLAGS = ("eagle", "base", "rotation", "output")


def convert_head(eagle: str | pathlib.Path, base: str | pathlib.Path, rotation: str | pathlib.Path,
                 output: str | pathlib.Path) -> pathlib.Path:
    """Writes the head `eagle`, adapted to `base` rotated by `rotation`, as `output`, which it returns.

    Raises:
      UserError: a head that does not fit the base, is damaged or adapted already, a rotated base, what `load_rotation`
        raises, or an output that is taken.
    """
    eagle, output = hub.local(str(eagle)), pathlib.Path(output)
    check_destination(output)
    reader = open_source(base)
    if reader.rotation_file:
        raise UserError(f"{base} is rotated ({reader.rotation_file.name}); --base takes the model that it was made from")
    config = outline_head(eagle, Outline.of(reader.llama, reader.formats)).config
    if config.rotated_target:
        raise UserError(f"{eagle} holds a head for a rotated target already")
    matrix = load_rotation(rotation, reader.llama.hidden_size)
    found = HeadFiles.open(eagle).read()
    check_finite(eagle, found)
    check_draft_ids(eagle, found, config.vocab_size)
    tensors = own_tables(reader) | dict(found) | undo_rotation(
        config, found[FC], np.asarray(reader.read("norm/scale")), matrix)
    settings = read_json(eagle / "config.json") | ({ROTATED_TARGET: True} if config.version == 3 else {})
    with staged(output) as directory:
        save_tensors(directory / "model.safetensors", tensors)
        put_json(directory / "config.json", settings)
    return output


def own_tables(reader: Reader) -> dict[str, np.ndarray]:
    """The base's embedding and lm_head: a head without its own can't take those of a rotated target."""
    embed = np.asarray(reader.read("embed/table"))
    if reader.llama.tie_embeddings:
        return {EMBED: embed, LM_HEAD: embed}
    lm_head = np.asarray(dense_values(reader.read("lm_head/w"))).astype(reader.formats.head.dtype, copy=False)
    return {EMBED: embed, LM_HEAD: lm_head.T}


def undo_rotation(config: EagleConfig, fc: Float[np.ndarray, "D F"], norm: Float[np.ndarray, "D"],
                  rotation: Float[np.ndarray, "D D"]) -> dict[str, np.ndarray]:
    """The tensors by which a head reads a rotated target's states.

    EAGLE-3 reads three residual streams x Q by `fc` alone, which takes Q in: (x Q) (W Q)^T = x W^T. EAGLE-2 reads the final
    norm's output, n Q without the norm's weight g, by an `fc` that reads its own features too; so a matrix of its own comes
    before it, diag(g) Q as [out, in] (SpecMQuant, arXiv:2505.22179).
    """
    rotation = rotation.astype(np.float64)
    if config.version == 3:
        streams = fc.astype(np.float64).reshape(len(fc), -1, len(rotation))
        return {FC: (streams @ rotation).reshape(fc.shape).astype(np.float32)}
    return {ROTATION: (norm.astype(np.float64)[:, None] * rotation).astype(np.float32)}


def main(argv: Sequence[str]) -> None:
    arguments(argv, _USAGE, 0)
    given = {name: flags.FLAGS[name].value for name in _FLAGS}
    for name, value in given.items():
        if not value:
            raise UserError(f"--{name} is missing; usage: {_USAGE}")
    print(convert_head(*given.values()))


if __name__ == "__main__":
    flags.DEFINE_string("eagle", None, "Directory or hub name of a head in the official layout, made for the base as it is.")
    flags.DEFINE_string("base", None, "The head's target before its rotation; anything that checkpoints_tools.convert reads.")
    flags.DEFINE_string("rotation", None, "The rotated checkpoint, or its rotation's file (.safetensors, .pth, .pt, .bin).")
    flags.DEFINE_string("output", None, "Directory to be made.")
    entry.run(main)
