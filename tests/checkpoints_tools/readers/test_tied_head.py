"""An lm_head that differs from the embedding it is said to be tied to is used, and this is said."""

import json

import numpy as np
import pytest
from sources import TINY, logical, random_tensors, write_hf

from checkpoints_tools.conversion import convert
from checkpoints_tools.inspect import describe
from checkpoints_tools.readers import open_source
from specmq_jax.errors import UserError
from specmq_jax.network.config import LlamaConfig

TIED = TINY | {"tie_word_embeddings": True}


def test_an_lm_head_beside_a_tied_embedding_is_used_where_it_differs(tmp_path, capsys):
    tensors = write_hf(tmp_path / "source", TIED, random_tensors(TINY, np.float16))
    reader = open_source(tmp_path / "source")
    said = capsys.readouterr().err
    assert said.startswith("notice: ") and said.count("\n") == 1
    assert "tie_word_embeddings" in said and "that one is used" in said
    assert said.removeprefix("notice: ").strip() == dict(describe(reader))["notes"]
    np.testing.assert_array_equal(reader.read("lm_head/w"), logical(tensors, TINY)["lm_head/w"])
    made = convert(tmp_path / "source", tmp_path / "made")
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    assert not LlamaConfig.from_directory(made).tie_embeddings


def test_an_lm_head_that_is_the_embedding_stays_tied(tmp_path, capsys):
    tensors = random_tensors(TIED, np.float16)
    write_hf(tmp_path / "source", TIED, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    reader = open_source(tmp_path / "source")
    assert reader.llama.tie_embeddings and not reader.notes and not capsys.readouterr().err
    assert dict(describe(reader))["notes"] == "none"


def test_a_misshapen_lm_head_beside_a_tied_embedding_is_refused(tmp_path):
    write_hf(tmp_path / "source", TIED, random_tensors(TIED) | {"lm_head.weight": np.zeros((3, 64), np.float32)})
    with pytest.raises(UserError, match=r"lm_head.weight has shape \[3, 64\]"):
        open_source(tmp_path / "source")
