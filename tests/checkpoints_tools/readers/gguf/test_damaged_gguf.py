"""A damaged GGUF file is one line, in no time and in no memory, wherever the damage is."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from sources import TINY, random_tensors, write_gguf
from test_gguf import byte_level_metadata, sentence_piece_metadata

from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.gguf.gguf_file import open_file
from specmq_jax.errors import UserError
from specmq_jax.network.parameters import parameter_shapes

CONFIG = TINY | {"vocab_size": 280, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
UINT32, STRING, ARRAY, F32 = (int(kind) for kind in (
    gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY, gguf.GGMLQuantizationType.F32))


def text(value: str | bytes) -> bytes:
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + values


def tensor(name: str, sizes: list[int], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_of(path, entries: list[bytes] = (), tensors: list[bytes] = (), data: int = 256, version: int = 3, counts=None):
    """A GGUF file written by hand."""
    counts = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % 32 + data))
    return path


def refusal(path) -> str:
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        open_source(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 400 + len(str(path))
    return message


LLAMA = entry("general.architecture", STRING, text("llama"))


@pytest.mark.parametrize(("content", "part"), [
    ({"counts": (2**60, 0)}, "truncated or damaged"), ({"counts": (0, 2**60)}, "truncated or damaged"),
    ({"version": 1}, "version 1"), ({"version": 3 << 24}, "big-endian"), ({"version": 999}, "version 999"),
    *(({"entries": [LLAMA, entry("x", ARRAY, array(kind, 2**60))]}, "entries; at most") for kind in range(9)),
    *(({"entries": [LLAMA, entry("x", ARRAY, array(kind, 2**20))]}, "expected at least") for kind in (0, 4, 8, 10)),
    ({"entries": [entry("x", ARRAY, array(ARRAY, 1, array(ARRAY, 1)))]}, "array of arrays"),
    ({"entries": [entry("x", ARRAY, array(77, 1))]}, "77 is not a valid"),
    ({"entries": [entry("x", 77, b"")]}, "77 is not a valid"),
    ({"entries": [entry("x", STRING, struct.pack("<Q", 2**60))]}, "expected at least"),
    ({"entries": [entry("x", STRING, struct.pack("<Q", 2**64 - 1))]}, "expected at least"),
    ({"entries": [LLAMA, LLAMA]}, "Duplicate general.architecture"),
    ({"entries": [entry(b"\xff", UINT32, bytes(4))]}, "utf-8"),
    ({"entries": [entry("general.architecture", STRING, text(b"\xff"))]}, "general.architecture that is not UTF-8"),
    *(({"entries": [entry("general.alignment", UINT32, struct.pack("<I", size))]}, "Invalid alignment") for size in (0, 3)),
    ({"entries": [entry("general.alignment", STRING, text("32"))]}, "Bad type for general.alignment"),
    ({"tensors": [tensor("a", [2**60])]}, "it has"), ({"tensors": [tensor("a", [2**32, 2**32])]}, "expected 73786976294838"),
    ({"tensors": [tensor("a", [2**63, 2])]}, "expected 73786976294838"), ({"tensors": [tensor("a", [65])]}, "expected"),
    ({"tensors": [tensor("a", [4], offset=2**64 - 1)]}, "expected 1844674407"),
    ({"tensors": [tensor("a", [])]}, "0 dimensions"), ({"tensors": [tensor("a", [1] * 5)]}, "5 dimensions"),
    ({"tensors": [tensor("a", [1], kind=999)]}, "tensor a has the unknown type 999"),
    ({"tensors": [tensor("a\nb", [4])]}, r"'a\nb'"),
    ({"tensors": [tensor("a", [31], kind=8)]}, "rows of 31 values"),
    ({"tensors": [tensor("a", [4]), tensor("b", [4])]}, "a and b overlap"),
    ({"tensors": [tensor("b", [4], offset=32), tensor("a", [9])]}, "a and b overlap"),
    ({"tensors": [tensor("a", [4]), tensor("a", [4], offset=32)]}, "duplicated tensor"),
    ({}, "architecture None"), ({"entries": [LLAMA]}, "'llama.attention.head_count'; found None"),
])
def test_a_header_that_is_wrong(tmp_path, content, part):
    assert part in refusal(file_of(tmp_path / "x.gguf", **content))


def test_a_header_that_is_right_is_read(tmp_path):
    texts = array(STRING, 2, text("a") + text("bc"))
    file = open_file(file_of(tmp_path / "x.gguf", [LLAMA, entry("texts", ARRAY, texts), entry("more", ARRAY, array(
        UINT32, 3, struct.pack("<3I", 5, 6, 7))), entry("none", ARRAY, array(UINT32, 0))], [tensor("a", [4]), tensor(
            "b", [2, 3], offset=32)]))
    found = {key: field.contents() for key, field in file.fields.items()}
    assert (found["texts"], found["more"], found["none"]) == (["a", "bc"], [5, 6, 7], [])
    assert {part.name: part.data.shape for part in file.tensors} == {"a": (4,), "b": (3, 2)}


@pytest.fixture(scope="module", params=[byte_level_metadata, sentence_piece_metadata])
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x.gguf"
    write_gguf(path, CONFIG, random_tensors(CONFIG), "Q8_0", metadata=request.param)
    return path.read_bytes()


@lengths
def test_bytes_of_the_header_at_random(tmp_path, whole, examples):
    path, made, header = tmp_path / "x.gguf", tmp_path / "made", len(whole) - sum(
        part.n_bytes for part in open_bytes(tmp_path, whole).tensors)
    made.mkdir()

    @searching(examples)
    @given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=3),
           st.none() | st.floats(0, 1))
    def search(changes, kept):
        content = bytearray(whole)
        for place, values in changes:
            at = int(place * header)
            content[at:at + len(values)] = values
        path.write_bytes(b"GGUF" + content[4:len(content) if kept is None else int(kept * len(content))])
        try:
            reader = open_source(path)
            for name in parameter_shapes(reader.llama):
                reader.read(name)
            reader.save_tokenizer(made)
        except UserError as error:
            assert "\n" not in str(error)

    search()


def open_bytes(directory, content: bytes) -> gguf.GGUFReader:
    (directory / "whole.gguf").write_bytes(content)
    return open_file(directory / "whole.gguf")


def test_a_file_cut_anywhere(tmp_path, whole):
    path = tmp_path / "x.gguf"
    for kept in np.unique(np.linspace(4, len(whole) - 1, 60).astype(int)):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=rf"x.gguf is truncated or damaged: it has {kept} bytes"):
            open_source(path)
