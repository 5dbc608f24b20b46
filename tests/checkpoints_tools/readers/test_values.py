"""Numbers that are not finite, or that a precision can't hold, are found in every layout and every part of a model."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fuzzing import lengths, searching
from hypothesis import given
from hypothesis import strategies as st
from packers import LAYOUTS, quantised_tensors, write_quantised
from refusals import refuse
from sources import TINY, random_tensors, write_gguf, write_hf

import specmq_jax as sm
from checkpoints_tools.conversion import convert, pack
from checkpoints_tools.export import export
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.files.rotation_file import save_rotation
from specmq_jax.errors import UserError

DOWN, PATH = "model.layers.0.mlp.down_proj", "layers_0/mlp/down/w"
NOT_FINITE = [np.nan, np.inf, -np.inf]


def refused(directory, text):
    """The one weight that is spoilt can't be packed as it is stored."""
    reader = open_source(directory)
    with pytest.raises(UserError, match=f"^tensor {PATH} .*{text}") as caught:
        pack(PATH, reader.read(PATH), reader.formats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scale_and_offset_of_every_layout_is_looked_at(tmp_path, layout):
    tensors, _ = quantised_tensors(LAYOUTS[layout], fused=False)
    floats = [name for name, values in tensors.items() if name.startswith(DOWN) and jnp.issubdtype(values.dtype, jnp.floating)
              and values.size]
    assert floats
    for name in floats:
        for wrong in NOT_FINITE:
            def spoil(tensors, name=name, wrong=wrong):
                tensors[name] = tensors[name].copy()
                tensors[name].reshape(-1)[-1] = wrong

            write_quantised(tmp_path / "source", LAYOUTS[layout], change=spoil)
            refused(tmp_path / "source", "not finite")


@pytest.mark.parametrize(("layout", "name", "value", "text"), [
    ("gptq-v1", "scales", 1e5, "beyond the range of float16"), ("gptq-act-order", "scales", 1e5, "beyond the range of float16"),
    ("auto-round", "scales", 65504, "beyond the range of float16"), ("marlin", "scales", 1e5, "beyond the range of float16"),
    ("marlin-channel", "scales", 1e5, "beyond the range of float16"),
    ("compressed", "weight_scale", 1e5, "beyond the range of float16"),
    ("gptq-v1", "scales", 1e-9, "below the range of float16"),
    ("compressed", "weight_scale", 1e-9, "below the range of float16"),
    ("compressed-int8", "weight_scale", 3e38, "beyond the range of float32"),
    ("qserve-int8", "dequant_scale", 3e38, "beyond the range of float32"),
    ("qqq", "s_channel", 3e37, "not finite"), ("qqq-g128", "s_channel", 3e38, "beyond the range of float32"),
    ("qoq", "s1_scales", 3e38, "beyond the range of float32"), ("qoq-g128", "s1_scales", 3e38, "beyond the range of float32"),
])
def test_scales_that_leave_a_range_are_refused(tmp_path, layout, name, value, text):
    def spoil(tensors):
        tensors[f"{DOWN}.{name}"] = np.full(tensors[f"{DOWN}.{name}"].shape, value, np.float32)

    write_quantised(tmp_path / "source", LAYOUTS[layout], change=spoil)
    refused(tmp_path / "source", text)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
                                  "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_every_tensor_of_a_plain_model_is_looked_at(tmp_path, name):
    for dtype, wrong in ((np.float32, np.nan), (np.float16, -np.inf), (ml_dtypes.bfloat16, np.nan)):
        tensors = random_tensors(TINY, dtype)
        tensors[name].reshape(-1)[7] = wrong
        write_hf(tmp_path / "source", TINY, tensors)
        refuse(tmp_path, tmp_path / "source", "not finite", "the checkpoint is damaged")


@pytest.mark.parametrize("precision", ["fp16", "w4a16-g32", "w8a8", "w8a16", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq",
                                       "w4a8-qoq-g128"])
def test_nan_is_found_before_it_becomes_a_code(tmp_path, precision):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    write_hf(tmp_path / "source", TINY, tensors)
    with pytest.raises(UserError, match="^tensor layers_1/mlp/down/w holds values that are not finite"):
        convert(tmp_path / "source", tmp_path / "made", precision)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_gguf_is_looked_at(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
    write_gguf(tmp_path / "model.gguf", TINY, tensors)
    refuse(tmp_path, tmp_path / "model.gguf", "tensor blk.0.ffn_up.weight holds a value that is not finite")


@pytest.mark.parametrize(("name", "value", "text"), [
    ("model.embed_tokens.weight", 1e5, "embed/table holds values beyond"),
    ("lm_head.weight", 1e5, "lm_head/w holds values beyond"),
    ("model.layers.0.mlp.up_proj.weight", 1e-8, "gate_up/w holds values of at")])
def test_values_outside_half_precision_are_refused_in_every_part(tmp_path, name, value, text):
    tensors = random_tensors(TINY)
    if value > 1:
        tensors[name][0, 0] = value
    else:
        tensors[name] *= value
        tensors["model.layers.0.mlp.gate_proj.weight"] *= value
    write_hf(tmp_path / "source", TINY, tensors)
    with pytest.raises(UserError, match=f"{text}.*range of float16; choose --precision=bf16 or fp32"):
        convert(tmp_path / "source", tmp_path / "made", "fp16")
    convert(tmp_path / "source", tmp_path / "made", "bf16")


@pytest.mark.parametrize("expand", [False, True])
def test_loading_at_another_precision_is_refused(tmp_path, expand):
    tensors = random_tensors(TINY)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e6
    write_hf(tmp_path / "source", TINY, tensors)
    made = convert(tmp_path / "source", tmp_path / "made")
    for precision in ("fp16", "w4a16-g32"):
        with pytest.raises(UserError, match="^tensor layers_1/mlp/down/w holds values beyond the range of float16"):
            sm.load(made, precision, expand=expand)
    assert np.isfinite(sm.logits(sm.load(made, "w8a16", expand=expand), [1, 2, 3])).all()


def test_a_norm_or_a_scale_that_an_export_can_not_hold_is_refused(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"][3] = 1e6
    write_hf(tmp_path / "source", TINY, tensors)
    with pytest.raises(UserError, match="norm/scale holds values beyond the range of float16"):
        export(tmp_path / "source", tmp_path / "made", "hf", precision="fp16")

    def spoil(tensors):
        tensors[f"{DOWN}.scales"] = np.full(tensors[f"{DOWN}.scales"].shape, 1e5, np.float32)

    write_quantised(tmp_path / "gptq", LAYOUTS["gptq-v1"], change=spoil)
    with pytest.raises(UserError, match=f"{PATH} holds values beyond the range of float16"):
        export(tmp_path / "gptq", tmp_path / "made", "gptq")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "gptq"}


def test_a_damaged_rotation_is_not_copied(tmp_path):
    write_hf(tmp_path / "source", TINY)
    save_rotation(tmp_path / "source", np.full((64, 64), np.nan, np.float32))
    refuse(tmp_path, tmp_path / "source", "rotation.safetensors holds values that are not finite")
    save_rotation(tmp_path / "source", np.eye(32, dtype=np.float32))
    refuse(tmp_path, tmp_path / "source", "rotates 32 dimensions; this model's hidden states have 64")


@lengths
@pytest.mark.parametrize("layout", ["gptq-act-order", "compressed-act-order", "qqq-g128", "qoq-g128"])
def test_any_bytes_of_a_quantised_file_may_be_wrong(tmp_path, layout, examples):
    write_quantised(tmp_path / "source", LAYOUTS[layout])
    file = tmp_path / "source" / "model.safetensors"
    sound = file.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(sound) - 1))

    @searching(examples)
    @given(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4))
    def search(changes):
        spoilt = bytearray(sound)
        for place, byte in changes:
            spoilt[place] = byte
        file.write_bytes(spoilt)
        try:
            reader = open_source(tmp_path / "source")
            pack(PATH, reader.read(PATH), reader.formats)
        except UserError as error:
            assert "\n" not in str(error)

    search()
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
