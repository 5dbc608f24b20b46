"""The files that belong to a model are those that transformers would take, and whatever is wrong with them is one line."""

import json
import struct

import numpy as np
import pytest
from anything import JSON
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from refusals import refuse
from safetensors.numpy import load_file, save_file
from sources import TINY, random_tensors, write_hf

from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.files.weight_files import find_weight_files
from specmq_jax.errors import UserError
from specmq_jax.network.parameters import parameter_shapes

Q = "model.layers.0.self_attn.q_proj"

INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def put(directory, *names):
    """Empty files; an index names the file a-<its own name's first part>."""
    for name in names:
        text = ""
        if name.endswith(".json"):
            shard = f"{name.partition('.')[0]}-1{'.bin' if '.bin.' in name else '.safetensors'}"
            (directory / shard).write_text("")
            text = json.dumps({"weight_map": {"a": shard}})
        (directory / name).write_text(text)


@pytest.mark.parametrize(("names", "taken"), [
    (["model.safetensors", INDEX, "pytorch_model.bin"], "model.safetensors"),
    ([INDEX, "consolidated.safetensors.index.json", "consolidated.safetensors"], "model-1.safetensors"),
    ([INDEX, "pytorch_model.bin", PICKLED_INDEX], "model-1.safetensors"),
    (["pytorch_model.bin", PICKLED_INDEX], "pytorch_model.bin"),
    ([PICKLED_INDEX, "training_args.bin"], "pytorch_model-1.bin"),
    (["pytorch_model.bin", "adapter.safetensors"], "pytorch_model.bin"),
    (["pytorch_model.bin", "rotation.safetensors"], "pytorch_model.bin"),
    (["model_gptq.safetensors", "adapter.safetensors"], "model_gptq.safetensors"),
    (["quant_model.pt", "pytorch_model.bin"], "quant_model.pt"),
    (["gptq_model-4bit-128g.safetensors", "rotation.safetensors"], "gptq_model-4bit-128g.safetensors"),
    (["consolidated.safetensors.index.json"], "consolidated-1.safetensors"),
    (["Llama-w4a8.pt", "rotation.pt"], "Llama-w4a8.pt"),
])
def test_one_file_or_index_is_taken_of_several(tmp_path, names, taken):
    put(tmp_path, *names)
    assert [file.name for file in find_weight_files(tmp_path).files] == [taken]


def test_a_file_that_config_json_names_is_taken(tmp_path):
    tensors = write_hf(tmp_path / "source", TINY | {"transformers_weights": "mine.safetensors"})
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "mine.safetensors")
    write_hf(tmp_path / "source", TINY | {"transformers_weights": "mine.safetensors"}, random_tensors(TINY, seed=1))
    np.testing.assert_array_equal(open_source(tmp_path / "source").read("norm/scale"), tensors["model.norm.weight"])
    write_hf(tmp_path / "source", TINY | {"transformers_weights": "../mine.safetensors"})
    refuse(tmp_path, tmp_path / "source", "names the file '../mine.safetensors'", "in the same directory")


def test_a_tensor_in_two_files(tmp_path):
    tensors = write_hf(tmp_path / "source", shards=2)
    file = tmp_path / "source" / "model-00001-of-00002.safetensors"
    save_file(load_file(file) | {f"{Q}.weight": tensors[f"{Q}.weight"]}, file)
    other = tmp_path / "source" / "model-00002-of-00002.safetensors"
    save_file(load_file(other) | {f"{Q}.weight": tensors[f"{Q}.weight"]}, other)
    refuse(tmp_path, tmp_path / "source", f"{Q}.weight stands in two files", file.name, other.name)


@pytest.mark.parametrize(("change", "part"), [
    (lambda names: names | {f"{Q}.weight": next(file for file in names.values() if file != names[f"{Q}.weight"])},
     f"holds the tensor {Q}.weight, which it does not"),
    (lambda names: names | {"absent": "model-00001-of-00002.safetensors"}, "holds the tensor absent, which it does not"),
    *((lambda names, name=name: names | {"model.norm.weight": name}, f"names the file {name!r}") for name in (
        "../model-00001-of-00002.safetensors", "/etc/passwd", "a/b", "..", "", 3, None, ["x"])),
    (lambda names: names | {"model.norm.weight": "model-3.safetensors"}, "model-3.safetensors is missing"),
    (lambda names: [], "has no weight_map"),
])
def test_an_index_that_contradicts_the_files(tmp_path, change, part):
    write_hf(tmp_path / "source", shards=2)
    index = tmp_path / "source" / INDEX
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    refuse(tmp_path, tmp_path / "source", part)


def write_header(path, header: str | bytes, data: bytes = b"") -> None:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(("header", "part"), [
    (json.dumps({"a": ONE, "b": ONE}), "invalid offset for tensor `"),  # of two in one place the library names either
    (json.dumps({"a": ONE | {"data_offsets": [4, 8]}}), "invalid offset for tensor `a`"),
    (json.dumps({"a": ONE | {"data_offsets": [4, 0]}}), "invalid offset for tensor `a`"),
    (json.dumps({"a": ONE | {"data_offsets": [-4, 0]}}), "invalid value"),
    (json.dumps({"a": ONE | {"data_offsets": [0, 10**30]}}), "invalid type"),
    (json.dumps({"a": ONE | {"data_offsets": [0, 4, 8]}}), "invalid length 3"),
    (json.dumps({"a": ONE | {"shape": [True]}}), "invalid type: boolean"),
    (json.dumps({"a": ONE | {"shape": [-1, -1]}}), "invalid value"),
    (json.dumps({"a": ONE | {"shape": [2]}}), "invalid shape, data type, or offset"),
    (json.dumps({"a": ONE | {"dtype": 3}}), "invalid type"),
    (json.dumps({"a": [1]}), "invalid type"),
    (json.dumps({"__metadata__": 1}), "invalid type"),
    ('{"a": ' * 100_000, "invalid JSON"),
    ('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + "]}}", "invalid JSON"),
    (b'{"\xff": 1}', "invalid UTF-8"),
    ("{}", "lacks the tensor model.embed_tokens.weight"),
])
def test_headers_that_are_not_as_the_format_has_them(tmp_path, header, part):
    write_hf(tmp_path / "source")
    write_header(tmp_path / "source" / "model.safetensors", header, b"" if header == "{}" else bytes(4))
    refuse(tmp_path, tmp_path / "source", "" if header == "{}" else "model.safetensors is damaged", part)


def open_and_read(directory) -> None:
    """All that a conversion reads; a `UserError` is a fair answer, of one line."""
    try:
        reader = open_source(directory)
        for path in parameter_shapes(reader.llama):
            reader.read(path)
    except UserError as error:
        assert "\n" not in str(error)


LITTLE = TINY | {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "head_dim": 4}


@lengths
def test_any_bytes_of_a_file_may_be_wrong(tmp_path, examples):
    write_hf(tmp_path / "source", LITTLE)
    file = tmp_path / "source" / "model.safetensors"
    sound = file.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(sound) - 1))

    @searching(examples)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6), st.one_of(st.none(), st.integers(0, len(sound) + 9)))
    def search(changes, length):
        spoilt = bytearray(sound)
        for place, byte in changes:
            spoilt[place] = byte
        file.write_bytes(spoilt[:length].ljust(length or 0, b"\0"))
        open_and_read(tmp_path / "source")

    search()
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


SIZES = st.lists(st.integers(-2, 1 << 66) | st.integers(0, 40), max_size=3)


@lengths
def test_any_entry_of_a_header_may_be_wrong(tmp_path, examples):
    write_hf(tmp_path / "source", LITTLE)
    file = tmp_path / "source" / "model.safetensors"
    sound = file.read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    entries = json.loads(sound[8:end])

    @searching(examples)
    @given(st.sampled_from(sorted(entries)), st.sampled_from(["dtype", "shape", "data_offsets", "x", None]), JSON | SIZES)
    def search(name, field, value):
        spoilt = entries | {name: value if field is None else entries[name] | {field: value}}
        write_header(file, json.dumps(spoilt), sound[end:])
        open_and_read(tmp_path / "source")

    search()


@lengths
def test_any_entry_of_an_index_may_be_wrong(tmp_path, examples):
    write_hf(tmp_path / "source", LITTLE, shards=2)
    index = tmp_path / "source" / INDEX
    sound = json.loads(index.read_text())
    files = st.sampled_from(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "..", "x" * 300, "\ud800"])

    @searching(examples)
    @given(st.sampled_from(sorted(sound["weight_map"])) | st.text(max_size=9), files | JSON, st.none() | JSON)
    def search(name, file, weight_map):
        spoilt = sound["weight_map"] | {name: file} if weight_map is None else weight_map
        index.write_text(json.dumps(sound | {"weight_map": spoilt}))
        open_and_read(tmp_path / "source")

    search()
