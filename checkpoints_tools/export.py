"""Writes a checkpoint for other programs: python -m checkpoints_tools.export SRC DST --format=hf|gptq [--precision=fp16]

SRC is anything that checkpoints_tools.convert reads. `hf` holds plain values, dequantised where SRC is quantised, as
transformers loads them. `gptq` holds W4A16 weights' integers and scales as they are, in the first version of AutoGPTQ's layout.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8

from checkpoints_tools.arguments import arguments, progress_bar
from checkpoints_tools.conversion import pack
from checkpoints_tools.readers import Reader, open_source
from checkpoints_tools.readers.base import Shape, module_shapes
from checkpoints_tools.readers.hf import is_unturned
from checkpoints_tools.readers.quantised.base import check_divisible, is_quantised
from checkpoints_tools.writers.shards import ShardWriter
from specmq_jax import formats
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination, put_json, staged
from specmq_jax.formats import Dense, DenseFormat, GroupedInt4, Int4GroupFormat, Logical, Quantised, dense_values, peak
from specmq_jax.network.parameters import Formats, parameter_shapes

SHARD_BYTES = 1 << 30
_USAGE = "python -m checkpoints_tools.export SRC DST --format=hf|gptq [--precision=NAME]"
_REPLACED = ("dtype", "torch_dtype", "quantization_config", "compression_config")
"""Entries of config.json that say how the source held its values."""
_ZEROS = 0x77777777
"""Eight zero points of 8 each, which this layout stores less one."""


class _Layout(NamedTuple):
    """check: refuses a source; tensors: of a path; describe: quantization_config, empty where there is none."""

    check: Callable[[Reader], None]
    tensors: Callable[[str, Logical, Mapping[str, Shape], DenseFormat], Iterator[tuple[str, np.ndarray]]]
    describe: Callable[[Reader, bool], dict[str, Any]]


def export(source: str | pathlib.Path, destination: str | pathlib.Path, layout: str, *, precision: str = "fp16",
           shard_bytes: int = SHARD_BYTES) -> pathlib.Path:
    """Writes `source` as a directory of safetensors files named `destination`, which it returns.

    Args:
      source: anything `readers.open_source` opens.
      destination: must not exist, or be an empty directory.
      layout: "hf" or "gptq".
      precision: fp32, bf16 or fp16, of what is not quantised.
      shard_bytes: of one file at the most, and of host memory beside one weight.

    Raises:
      UserError: what the reader finds wrong, an unknown layout or precision, weights that the layout or the precision can't
        hold, or a destination that is taken.
    """
    if layout not in _LAYOUTS:
        raise UserError(f"--format is {layout!r}; expected {' or '.join(_LAYOUTS)}")
    dense = formats.get(precision)
    if not isinstance(dense, DenseFormat):
        raise UserError(f"--precision is {precision!r}, of the values that are not quantised; expected fp32, bf16 or fp16")
    destination = pathlib.Path(destination)
    check_destination(destination)
    reader = open_source(source)
    reader.llama.require("exporting")
    _LAYOUTS[layout].check(reader)
    with staged(destination) as directory:
        reader.save_tokenizer(directory)
        reader.save_rotation(directory)
        act_order = _write_weights(reader, ShardWriter(directory, shard_bytes), _LAYOUTS[layout], dense)
        config = {key: value for key, value in reader.config.items() if key not in _REPLACED}
        config["torch_dtype"] = str(dense.dtype)
        quantisation = _LAYOUTS[layout].describe(reader, act_order)
        if quantisation:
            config["quantization_config"] = quantisation
            put_json(directory / "quantize_config.json", quantisation)
        put_json(directory / "config.json", config)
    return destination


def _write_weights(reader: Reader, writer: ShardWriter, layout: _Layout, dense: DenseFormat) -> bool:
    """Writes every weight, read one at a time; says whether rows of one are out of the order of their groups."""
    shapes, act_order = parameter_shapes(reader.llama), False
    with progress_bar() as progress:
        task = progress.add_task(f"{reader.location.name} to safetensors", total=len(shapes))
        for path, shape in shapes.items():
            logical = reader.read(path)
            act_order |= isinstance(logical, GroupedInt4) and _in_another_order(logical)
            if path == "lm_head/w" and isinstance(logical, Quantised) and not _has_gptq_head(reader):
                logical = dense_values(logical)
            for name, tensor in layout.tensors(path, logical, _modules(reader, path, shape), dense):
                writer.add(name, tensor)
            progress.advance(task)
    writer.finish()
    return act_order


def _modules(reader: Reader, path: str, shape: Shape) -> Mapping[str, Shape]:
    """Hugging Face's modules that make up a path, none of them fused."""
    return module_shapes(reader.llama, path, shape, lambda module: False)


def _plain_tensors(path: str, logical: Logical, modules: Mapping[str, Shape], dense: DenseFormat
                   ) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the modules that make up a path, as [out, in]."""
    packed = pack(path, logical, Formats(linear=dense, head=dense, embed=dense))
    values = np.asarray(packed.values if isinstance(packed, Dense) else packed)
    dense.range.check(peak(values), f"tensor {path}")  # norms are packed in f32
    begin = 0
    for module, shape in modules.items():
        if is_unturned(module, shape):
            yield f"{module}.weight", values.astype(dense.dtype)
        else:
            yield f"{module}.weight", values[:, begin:begin + shape[1]].T
            begin += shape[1]


def _gptq_tensors(path: str, logical: Logical, modules: Mapping[str, Shape], dense: DenseFormat
                  ) -> Iterator[tuple[str, np.ndarray]]:
    """As `_plain_tensors`, but for 4-bit weights, of which integers, scales and order stay as they are."""
    if not isinstance(logical, GroupedInt4):
        yield from _plain_tensors(path, logical, modules, dense)
        return
    logical.check(f"tensor {path}")
    Int4GroupFormat(group_size=logical.group_size).range.check(logical.peak(), f"tensor {path}")
    q, scales, rows = np.asarray(logical.q), np.asarray(logical.scales), len(logical.q)
    groups = np.arange(rows, dtype=np.int32) // (rows if logical.group_size == -1 else logical.group_size)
    if logical.order is not None:
        back = np.argsort(logical.order)
        q, groups = q[back], groups[back]
    begin = 0
    for module, shape in modules.items():
        columns = slice(begin, begin + shape[1])
        yield f"{module}.qweight", gptq_words(q[:, columns])
        yield f"{module}.qzeros", np.full((len(scales), shape[1] // 8), _ZEROS, np.int32)
        yield f"{module}.scales", scales[:, columns].astype(np.float16)
        yield f"{module}.g_idx", groups
        begin += shape[1]


def gptq_words(q: UInt8[np.ndarray, "K N"]) -> Int32[np.ndarray, "K8 N"]:
    """GPTQ's packed codes: row k is bits 4 (k % 8) of word k / 8; `readers.layouts.gptq_codes` undoes it."""
    words = np.zeros((len(q) // 8, q.shape[1]), np.uint32)
    for i in range(8):
        words |= q[i::8].astype(np.uint32) << (4 * i)
    return words.view(np.int32)


def _check_gptq(reader: Reader) -> None:
    linear = reader.formats.linear
    if not isinstance(linear, Int4GroupFormat):
        raise UserError(f"{reader.location} holds {linear.name} weights, and GPTQ's layout takes W4A16; make them by python -m "
                        "checkpoints_tools.quantize SRC DST --precision=w4a16")
    for path, shape in parameter_shapes(reader.llama).items():
        for module, part in _modules(reader, path, shape).items():
            if is_quantised(module) or module == "lm_head" and _has_gptq_head(reader):
                check_divisible(module, part, 8, 8)


def _in_another_order(logical: GroupedInt4) -> bool:
    return logical.order is not None and not np.array_equal(logical.order, np.arange(len(logical.order)))


def _describe_gptq(reader: Reader, act_order: bool) -> dict[str, Any]:
    return {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": reader.formats.linear.group_size,
            "desc_act": act_order, "sym": True, "lm_head": _has_gptq_head(reader)}


def _has_gptq_head(reader: Reader) -> bool:
    """Whether lm_head is quantised as the layers are; one in another way is written as its values."""
    head, linear = reader.formats.head, reader.formats.linear
    return (not reader.llama.tie_embeddings and isinstance(head, Int4GroupFormat) and isinstance(linear, Int4GroupFormat)
            and head.group_size == linear.group_size)


_LAYOUTS = {"hf": _Layout(lambda reader: None, _plain_tensors, lambda reader, act_order: {}),
            "gptq": _Layout(_check_gptq, _gptq_tensors, _describe_gptq)}


def main(argv: Sequence[str]) -> None:
    source, destination = arguments(argv, _USAGE, 2)
    if not flags.FLAGS.format:
        raise UserError(f"--format is missing; expected {' or '.join(_LAYOUTS)}; usage: {_USAGE}")
    print(export(source, destination, flags.FLAGS.format, precision=flags.FLAGS.precision,
                 shard_bytes=flags.FLAGS.shard_bytes))


if __name__ == "__main__":
    flags.DEFINE_string("format", None, "What to write: hf (plain values) or gptq (W4A16 in AutoGPTQ's layout).")
    flags.DEFINE_string("precision", "fp16", "Of the values that are not quantised: fp32, bf16 or fp16.")
    flags.DEFINE_integer("shard_bytes", SHARD_BYTES, "Bytes of one file at the most, unless one tensor alone has more.",
                         lower_bound=1)
    entry.run(main)
