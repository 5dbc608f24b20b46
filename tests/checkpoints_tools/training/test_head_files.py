"""What training and conversion write of a head can be loaded, or nothing is written."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sources import DATA

import specmq_jax as sm
from checkpoints_tools.convert_eagle_rotation import convert_head
from checkpoints_tools.rotate import rotate
from checkpoints_tools.training import head_files
from specmq_jax.json_files import read_json

BASE, HEAD = DATA / "checkpoints" / "fp16", DATA / "eagle" / "eagle2_head"


def test_a_head_that_training_has_driven_beyond_half_precision_is_not_written(tmp_path):
    target = sm.load(BASE, expand=True)
    official = head_files.official_config(2, target.config, read_json(BASE / "config.json"), 512)
    config = head_files.new_config(official, target.config)
    params = head_files.initial_parameters(config, target.dense().params, None, jax.random.key(0))
    head_files.export(tmp_path / "good", params, config, official, None)
    assert sm.load_head(tmp_path / "good", target).config == config
    for value in (np.nan, 1e5):
        params["mlp"]["down"]["w"] = params["mlp"]["down"]["w"].at[3, 4].set(value)
        with pytest.raises(sm.UserError, match="tensor layers.0.mlp.down_proj.weight holds values that float16 can't hold"):
            head_files.export(tmp_path / "bad", params, config, official, None)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_damaged_head_is_not_adapted(tmp_path):
    rotated = rotate(BASE, tmp_path / "rotated", seed=2)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((HEAD / "config.json").read_bytes())
    tensors = load_file(HEAD / "model.safetensors")
    tensors["fc.bias"][7] = np.inf
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(sm.UserError, match="tensor fc.bias holds values that are not finite"):
        convert_head(damaged, BASE, rotated, tmp_path / "made")
    assert not (tmp_path / "made").exists()
