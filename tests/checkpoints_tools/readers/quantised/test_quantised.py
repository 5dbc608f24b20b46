"""What toolkits packed is read back exactly: integers, scales, order of rows."""


import numpy as np
import pytest
from packers import LAYOUTS, SMALL, Layout, grouped, indices, pack_gptq, write_quantised
from same import assert_same
from sources import random_tensors

from checkpoints_tools.conversion import convert
from checkpoints_tools.inspect import describe
from checkpoints_tools.readers import open_source
from checkpoints_tools.readers.quantised import layouts
from specmq_jax import formats
from specmq_jax.loading import checkpoint


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_packed_is_read(tmp_path, name, fused):
    expected = write_quantised(tmp_path / "source", LAYOUTS[name], fused=fused)
    reader = open_source(tmp_path / "source")
    assert reader.formats.linear.name == LAYOUTS[name].linear
    for path, weight in expected.items():
        assert_same(reader.read(path), weight)
    values = random_tensors(SMALL, np.float16)
    np.testing.assert_array_equal(reader.read("embed/table"), values["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_native_checkpoint_holds_what_was_packed(tmp_path, name):
    expected = write_quantised(tmp_path / "source", LAYOUTS[name])
    made = checkpoint.CheckpointReader(convert(tmp_path / "source", tmp_path / "made"))
    assert made.formats.linear.name == LAYOUTS[name].linear
    assert "quantization_config" not in (made.directory / "config.json").read_text()
    for path, weight in expected.items():
        found = made.formats.linear.unpack(made.read(path), weight.shape)
        # f16 holds scales of bf16 to within its own precision
        np.testing.assert_allclose(found, weight.dense(), rtol=1e-3 if "compressed" in name else 1e-6)


@pytest.mark.parametrize("name", ["qqq", "qqq-g128", "compressed"])
def test_shards_with_an_index(tmp_path, name):
    expected = write_quantised(tmp_path / "source", LAYOUTS[name], shards=3)
    reader = open_source(tmp_path / "source")
    assert len(reader.files) == 3
    for path, weight in expected.items():
        assert_same(reader.read(path), weight)


def without_groups(tensors):
    for name in [name for name in tensors if name.endswith(".s_group")]:
        del tensors[name]


def with_unfused_groups(tensors):
    without_groups(tensors)
    tensors |= {f"model.layers.0.{module}.s_group": np.empty(0, np.float16)
                for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")}


@pytest.mark.parametrize("change", [without_groups, with_unfused_groups])
def test_qqq_per_channel_without_its_empty_tensors(tmp_path, change):
    expected = write_quantised(tmp_path / "source", LAYOUTS["qqq"], fused=True, change=change)
    assert_same(open_source(tmp_path / "source").read("layers_0/mlp/down/w"), expected["layers_0/mlp/down/w"])


def test_the_published_w4a16_file_name_is_found(tmp_path):
    write_quantised(tmp_path / "source", LAYOUTS["marlin"], fused=True)
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "model_gptq.safetensors")
    (tmp_path / "source" / "adapter.safetensors").write_bytes(b"")
    assert open_source(tmp_path / "source").kind == "GPTQ for Marlin"


def test_act_order_in_one_module_only(tmp_path):
    """o_proj's rows are out of order and the others' are not: the format is one, and the others' order is their own."""
    mixed = Layout(lambda rng, rows, columns: grouped(32, act_order=rows == 128)(rng, rows, columns), pack_gptq(7),
                   LAYOUTS["gptq-act-order"].quantisation, "")
    expected = write_quantised(tmp_path / "source", mixed, settings={"group_size": 32})
    reader = open_source(tmp_path / "source")
    assert reader.formats.linear.name == "w4a16-g32-act-order"
    np.testing.assert_array_equal(reader.read("layers_0/attention/qkv/w").order, np.arange(256))
    for path, weight in expected.items():
        np.testing.assert_array_equal(reader.read(path).dense(), weight.dense())


def test_act_order_means_the_rows_of_the_file(tmp_path):
    """w[k, n] = (q[k, n] - 8) scales[g_idx[k], n], with the rows in the file's order."""
    expected = write_quantised(tmp_path / "source", LAYOUTS["gptq-act-order"])["layers_0/mlp/down/w"]
    tensors = pack_gptq(7)(expected)
    k, n = indices(expected.shape)
    q = tensors["qweight"].view(np.uint32)[k // 8, n] >> (4 * (k % 8)).astype(np.uint32) & 15
    values = (q.astype(np.float32) - 8) * tensors["scales"].astype(np.float32)[tensors["g_idx"]]
    np.testing.assert_array_equal(open_source(tmp_path / "source").read("layers_0/mlp/down/w").dense(), values)


def test_other_precisions_can_be_made_of_act_order(tmp_path):
    expected = write_quantised(tmp_path / "source", LAYOUTS["gptq-act-order"])
    made = checkpoint.CheckpointReader(convert(tmp_path / "source", tmp_path / "made", "fp32"))
    for path, weight in expected.items():
        np.testing.assert_array_equal(made.read(path).values, weight.dense())
    lossy = checkpoint.CheckpointReader(convert(tmp_path / "source", tmp_path / "lossy", "w4a16"))
    assert lossy.read("layers_0/mlp/down/w").order is None


def test_inspect_tells_what_the_files_hold(tmp_path):
    write_quantised(tmp_path / "source", LAYOUTS["qoq-g128"])
    told = dict(describe(open_source(tmp_path / "source")))
    assert told["kind"] == "QServe QoQ" and told["precision"].startswith("linear w4a8-qoq-g128")
    assert "7 x int4 for int8, g128" in told["tensors"]


def test_names_of_act_order_are_known_but_not_offered():
    assert formats.get("w4a16-g128-act-order") == formats.get("w4a16-act-order")
    assert not [name for name in formats.names() if "act-order" in name]


@pytest.mark.parametrize("shape", [(128, 64), (256, 192)])
def test_scales_orders_are_permutations(shape):
    n = np.arange(shape[1], dtype=np.float32)[None]
    for undone in (layouts.group_scales(n), layouts.channel_scales(n)[None],
                   *(layouts.qserve_group_parameters(n, kernel_order=order) for order in (True, False))):
        np.testing.assert_array_equal(np.sort(undone), n)
        assert (undone != n).any()
