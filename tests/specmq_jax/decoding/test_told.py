"""What the library tells of itself: short representations, and times that were measured."""

import jax
import jax.numpy as jnp
import pytest

import specmq_jax as sm
from experiments.timing import device
from specmq_jax.loading.memory import Room
from specmq_jax.loading.model import Outline, outline


def test_a_model_and_a_decoder_are_one_short_line(tiny, tiny_draft):
    decoder = sm.Decoder(tiny, sm.ChainDrafter(tiny_draft, 3), sm.DecodeConfig(max_len=64))
    said = repr(tiny)
    assert said.startswith("Model(") and "2 layers of 64, 61 tokens, 0." in said and len(said) < 100
    assert repr(decoder) == f"Decoder({tiny!r}, {decoder.drafter!r}, max_len=64)" and len(repr(decoder)) < 300
    assert repr(sm.Decoder(tiny, config=sm.DecodeConfig(max_len=64))) == f"Decoder({tiny!r}, max_len=64)"
    assert "\n" not in repr(decoder)


def test_a_loaded_model_bears_its_checkpoints_name(checkpoint):
    loaded, described = sm.load(checkpoint), outline(checkpoint)
    assert isinstance(described, Outline) and repr(described) == repr(loaded).replace("Model(", "Outline(")
    assert repr(loaded).startswith("Model(fp16 at fp16, 2 layers of 256, 512 tokens, ")


@pytest.fixture
def checkpoint(request):
    return request.config.rootpath / "tests" / "data" / "checkpoints" / "fp16"


def test_a_state_is_one_short_line_in_and_out_of_jitted_functions(tiny):
    decoder, seen = sm.Decoder(tiny, config=sm.DecodeConfig(max_len=64)), []
    state = decoder.prefill([1, 2, 3])
    assert repr(state).startswith("DecodeState(length=4, limit=64, done=False, rounds=0, ")
    jax.jit(lambda state: (seen.append(repr(state)), state.length)[1])(state)
    seen += [repr(jax.eval_shape(lambda state: state, state)), repr(jax.tree.map(lambda leaf: None, state)),
             repr(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state.replace(key=jnp.zeros(1))))]
    decoder.round(state)
    seen.append(repr(state))  # which that round has consumed
    assert all(said.startswith("DecodeState(") and len(said) < 500 and "\n" not in said for said in seen)
    assert "consumed" in seen[-1]


def test_a_generation_is_one_short_line(tiny):
    said = repr(sm.Decoder(tiny, config=sm.DecodeConfig(max_len=64)).generate([1, 2, 3], 2))
    assert said.startswith("Generation(2 tokens in 1 round, ") and said.endswith("stopped=False)") and len(said) < 150


def test_the_copy_speed_is_measured_anew_each_time():
    first, second = device.device_bandwidth(), device.device_bandwidth()
    assert first > 0 and second > 0 and first != second


def test_a_device_without_room_for_a_copy_has_no_copy_speed(monkeypatch):
    monkeypatch.setattr(device, "room", lambda: Room(free=2**20, limit=2**30))
    assert device.device_bandwidth() is None

