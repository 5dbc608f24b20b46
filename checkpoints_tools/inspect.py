"""Shows what a checkpoint holds, after checking it: python -m checkpoints_tools.inspect SRC

SRC is anything that checkpoints_tools.convert reads.
"""

import collections
import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from checkpoints_tools.arguments import arguments
from checkpoints_tools.readers import Reader, open_source
from specmq_jax.commands import entry
from specmq_jax.network.parameters import parameter_shapes


def describe(reader: Reader) -> Iterator[tuple[str, str]]:
    """What `inspect` prints, as pairs of a heading and a text."""
    config, rope = reader.llama, reader.llama.rope
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for stored in reader.stored.values():
        counts[stored.type][0] += 1
        counts[stored.type][1] += stored.nbytes
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    yield "kind", reader.kind
    yield "location", str(reader.location)
    yield "architecture", str((reader.config.get("architectures") or ["?"])[0])
    yield "family", f"{config.family}, with {', '.join(config.beyond_llama) or 'nothing'} beyond Llama"
    yield "layers", str(config.num_layers)
    yield "hidden / intermediate", f"{config.hidden_size} / {config.intermediate_size}"
    yield "heads / kv heads / size", f"{config.num_heads} / {config.num_kv_heads} / {config.head_dim}"
    yield "vocabulary", f"{config.vocab_size}, embeddings {'tied' if config.tie_embeddings else 'not tied'}"
    yield "positions", f"{config.max_position}, rope {rope.type}, theta {rope.theta:g}"
    yield "parameters", f"{parameters:,}"
    yield "precision", ", ".join(f"{part} {name}" for part, name in reader.formats.names.items())
    yield "tensors", "\n".join(f"{count} x {kind}, {nbytes:,} bytes" for kind, (count, nbytes) in sorted(counts.items()))
    yield "tokenizer", reader.tokenizer or "none"
    yield "rotation", reader.rotation_file.name if reader.rotation_file else "none"
    yield "notes", "\n".join(reader.notes) or "none"
    yield "files", f"{len(reader.files)}, {sum(file.stat().st_size for file in reader.files):,} bytes"


def main(argv: Sequence[str]) -> None:
    (source,) = arguments(argv, "python -m checkpoints_tools.inspect SRC", 1)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for heading, text in describe(open_source(source)):
        table.add_row(heading, text)
    Console().print(table)


if __name__ == "__main__":
    entry.run(main)
