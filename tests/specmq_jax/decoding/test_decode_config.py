"""What can't be decoded so is said in one line, when the configuration is made."""

import math

import numpy as np
import pytest

import specmq_jax as sm

HUGE = 10**5000


@pytest.mark.parametrize(("changes", "part"), [
    ({"max_len": 1}, "'max_len' of at least 2"), ({"max_len": 64.0}, "'max_len'"), ({"max_len": True}, "'max_len'"),
    ({"max_len": "64"}, "'max_len'"), ({"max_len": None}, "'max_len'"), ({"max_len": HUGE}, "'max_len'"),
    ({"max_len": -5}, "'max_len'"), ({"prefill_chunks": (0,)}, "'prefill_chunks'"), ({"prefill_chunks": ()}, "none"),
    ({"prefill_chunks": (16, -1)}, "-1"), ({"prefill_chunks": (16.0,)}, "16.0"), ({"prefill_chunks": (True,)}, "True"),
    ({"prefill_chunks": 16}, "'prefill_chunks'"), ({"prefill_chunks": "16"}, "'16'"), ({"stop_tokens": (1, "2")}, "'2'"),
    ({"stop_tokens": 2}, "'stop_tokens'"), ({"stop_tokens": (2.0,)}, "2.0"), ({"stop_tokens": (None,)}, "None"),
    ({"stop_tokens": (2**31,)}, "'stop_tokens'"), ({"stop_tokens": "ab"}, "'ab'"), ({"seed": 1.0}, "'seed'"),
    ({"seed": "1"}, "'seed'"), ({"seed": None}, "'seed'"), ({"seed": True}, "'seed'"),
    ({"sampling": None}, "'sampling'"), ({"sampling": "greedy"}, "'sampling'"), ({"reproducible": "yes"}, "'reproducible'"),
])
def test_a_senseless_way_to_decode_is_one_line(changes, part):
    with pytest.raises(sm.UserError) as caught:
        sm.DecodeConfig(**changes)
    assert str(caught.value).startswith("DecodeConfig needs") and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_and_numpys_integers_describe_decoding_as_well():
    made = sm.DecodeConfig(max_len=np.int64(64), stop_tokens=[np.int32(1), 2], prefill_chunks=[16], seed=np.int64(3))
    assert made == sm.DecodeConfig(max_len=64, stop_tokens=(1, 2), prefill_chunks=(16,), seed=3)
    assert sm.DecodeConfig(seed=10**30).seed == 10**30 and sm.DecodeConfig(seed=-1).seed == -1


@pytest.mark.parametrize("key", ["depth", "top_k", "size"])
def test_a_tree_of_something_else_than_integers_is_one_line(key):
    for value in (True, 6.0, "6", None, math.nan, HUGE, [6]):
        with pytest.raises(sm.UserError, match=f"TreeConfig needs an integer '{key}'"):
            sm.TreeConfig(**{key: value})


def test_a_fitting_tree_has_as_many_nodes_as_there_are_candidates_and_no_more_than_asked_for():
    assert sm.TreeConfig.fitting(6, 10, 60) == sm.TreeConfig(depth=6, top_k=10, size=60)
    assert sm.TreeConfig.fitting(2, 3, 60) == sm.TreeConfig.fitting(2, 3) == sm.TreeConfig(depth=2, top_k=3, size=13)
    assert sm.TreeConfig.fitting(1, 1, 60).size == 2
    with pytest.raises(sm.UserError, match="a size of at least 2; found 2, 3, 1"):
        sm.TreeConfig.fitting(2, 3, 1)
