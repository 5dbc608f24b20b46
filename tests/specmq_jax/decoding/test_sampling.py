"""Sampling: filters against their definition, noise keyed by position alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import cuda_text, launches

from pallas_kernels.nucleus import least_kept
from specmq_jax import Greedy, Sampling, UserError
from specmq_jax.decoding import sampling
from specmq_jax.decoding.request_sampling import Needs, Past, RequestKey, RequestSampling
from specmq_jax.decoding.sampling import seed_key


def test_top_k_and_top_p_keep_what_their_definition_keeps():
    scores = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.15, 0.1]]))
    kept = lambda **options: set(np.flatnonzero(np.isfinite(Sampling(**options).filter(scores)[0])))  # noqa: E731
    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {0, 2}
    assert kept(top_p=0.7) == {0, 2}
    assert kept(top_p=0.71) == {0, 2, 3}
    assert kept(top_p=1e-6) == {0}
    assert kept(top_k=3, top_p=0.8) == {0, 2}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}


def test_the_noise_depends_on_the_position_alone():
    key, sampled = jax.random.key(3), Sampling(temperature=0.7)
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    together = sampled(logits, jnp.arange(10, 16), key)
    alone = [int(sampled(logits[i:i + 1], jnp.array([10 + i]), key)[0]) for i in range(6)]
    assert together.tolist() == alone
    same = sampled(jnp.tile(logits[:1], (6, 1)), jnp.full(6, 4), key)
    assert len(set(same.tolist())) == 1


def test_greedy_takes_the_lower_id_of_a_tie():
    assert Greedy()(jnp.array([[1.0, 2.0, 2.0]]), jnp.array([0]), jax.random.key(0)).tolist() == [1]


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "temperature must be a number above 0 that float32 holds; found 0.0"),
    ({"top_p": 0.0}, "top_p must lie in"),
    ({"temperature": float("nan")}, "found nan"), ({"temperature": float("inf")}, "found inf"),
    ({"temperature": "1"}, "found '1'"), ({"temperature": 1e39}, "that float32 holds; found 1e\\+39"),
    ({"temperature": True}, "found True"),
    ({"top_p": float("nan")}, "top_p must lie in"), ({"top_p": "0.5"}, "top_p must lie in"),
    ({"top_k": -1}, "top_k must be a whole number of 0 or more"), ({"top_k": 2.0}, "top_k must be a whole number"),
    ({"top_k": True}, "top_k must be a whole number")])
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


EXTREMES = (1.0, 1e-3, 1e-6, 1e-37, 1e-38, 1e-40, 1e-45, 1e-46, 1e-300)


def ways(temperature, top_p, top_k=0):
    """The library's sampling and the server's, as functions of logits, positions and a seed."""
    own, shared = Sampling(temperature=temperature, top_p=top_p, top_k=top_k), RequestSampling()
    yield lambda logits, positions, seed: own(logits, positions, seed_key(seed))
    yield lambda logits, positions, seed: shared(
        logits, positions, RequestKey.of(seed=seed, temperature=temperature, top_p=top_p, top_k=top_k))


@pytest.mark.parametrize("temperature", EXTREMES[1:])
@pytest.mark.parametrize("top_p", [1.0, 0.9, *EXTREMES[3:]])
def test_a_tiny_temperature_draws_the_best_token(temperature, top_p):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)) * 30, jnp.float32)
    for draw in ways(temperature, top_p):
        assert draw(logits, jnp.arange(4), 0).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", EXTREMES[1:])
@pytest.mark.parametrize("temperature", [1.0, 1e10, 1e38, 3.4e38])
def test_a_tiny_nucleus_is_the_best_token(temperature, top_p):
    logits = jnp.arange(50.0)[None, ::-1] * 1e-2
    for draw in ways(temperature, top_p):
        if temperature < 1e38:  # beyond it all probabilities are one in f32
            assert draw(logits, jnp.arange(1), 3).tolist() == [0]
        else:
            assert 0 <= int(draw(logits, jnp.arange(1), 3)[0]) < 50


def test_best_tokens_that_tie_share_the_draws_at_any_temperature():
    logits = jnp.asarray([3.0, 7.0, 7.0, -jnp.inf])
    for temperature in EXTREMES[1:]:
        for draw in ways(temperature, 1.0):
            drawn = draw(jnp.tile(logits, (400, 1)), jnp.arange(400), 1)
            assert set(drawn.tolist()) == {1, 2} and 130 < int((drawn == 1).sum()) < 270


@pytest.mark.parametrize("top_k", [0, 3, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.999999999, 0.8, 0.3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_those_of_the_definition(temperature, top_p, top_k):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    chances = np.exp(logits / temperature)
    chances[top_k or 6:] = 0
    chances /= chances.sum()
    chances[np.cumsum(chances) - chances >= top_p] = 0
    chances /= chances.sum()
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = jnp.asarray(logits[order], jnp.float32)
    for draw in ways(temperature, top_p, top_k):
        drawn = np.asarray(draw(jnp.tile(shuffled, (6000, 1)), jnp.arange(6000), 5))
        found = np.bincount(order[drawn], minlength=6) / 6000
        assert not found[chances == 0].any()
        np.testing.assert_allclose(found, chances, atol=0.03)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_what_is_not_finite_is_drawn_so_that_it_is_found(top_p, top_k):
    logits = jnp.zeros((2, 50)).at[0, 7].set(jnp.inf).at[1].set(jnp.nan)
    for draw in ways(0.8, top_p, top_k):
        assert not jnp.isfinite(jnp.take_along_axis(logits, draw(logits, jnp.arange(2), 0)[:, None], axis=1)).any()


def keys_of(settings):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(RequestKey.of(**each) for each in settings))


def test_requests_beside_each_other_draw_what_each_draws_alone():
    settings = [{"seed": 1}, {"seed": 2, "temperature": 0.9}, {"seed": 3, "temperature": 1.2, "top_p": 0.7},
                {"seed": 4, "temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"seed": 5, "temperature": 2.0, "min_p": 0.2},
                {"seed": 6, "temperature": 1.0, "top_k": 4, "logit_bias": {3: 5.0, 11: -100.0}, "barred": [3, 8], "bar": 40}]
    logits = jax.random.normal(jax.random.key(0), (len(settings), 7, 60)) * 3
    positions = jnp.broadcast_to(jnp.arange(37, 44), (len(settings), 7))
    together = jax.jit(jax.vmap(RequestSampling()))(logits, positions, keys_of(settings))
    for found, own, place, each in zip(together, logits, positions, settings, strict=True):
        assert found.tolist() == RequestSampling()(own, place, RequestKey.of(**each)).tolist()
    assert 3 not in together[5][:3] and 8 not in together[5][:3]


@pytest.mark.parametrize("implementation", ["interpret", pytest.param("kernel", marks=pytest.mark.gpu)])
def test_the_kernel_draws_what_the_reference_draws(implementation, monkeypatch):
    logits, settings = jax.random.normal(jax.random.key(5), (9, 300)) * 3, [(0, 0.9), (20, 0.95), (5, 1.0)]

    def drawn(chosen):
        monkeypatch.setattr(sampling, "least_kept", functools.partial(least_kept, implementation=chosen))
        return [draw(logits, jnp.arange(9), seed).tolist() for seed, (top_k, top_p) in enumerate(settings)
                for draw in ways(0.8, top_p, top_k)]

    assert drawn(implementation) == drawn("reference")


@pytest.mark.parametrize("needs", [Needs.DRAWS, Needs.PENALTIES])
def test_a_gpu_neither_sorts_nor_asks_the_host(needs, monkeypatch):
    def draw(logits, positions, key, tokens, length):
        one = lambda *each: needs.sampler(*each[:3], Past.committed(*each[3:], len(each[0])))  # noqa: E731
        return jax.vmap(one)(logits, positions, key, tokens, length)

    monkeypatch.setattr(sampling, "least_kept", functools.partial(least_kept, implementation="kernel"))
    key = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), RequestKey.of(seed=0))
    text = cuda_text(draw, jax.ShapeDtypeStruct((4, 8, 32000), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.int32), key,
                     jax.ShapeDtypeStruct((4, 100), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32))
    assert launches(text) == 3  # equal ones are written once
    assert not any(name in text for name in ("chlo.top_k", "stablehlo.sort", "stablehlo.case", "stablehlo.if"))


@pytest.mark.parametrize(("seed", "same"), [
    (41, 41), (2**32 + 5, 5), (-1, 2**32 - 1), (99999999999999999999, 99999999999999999999 % 2**32), (-10**40, -10**40 % 2**32),
    (np.int64(7), 7), (np.uint64(2**63), 0)])
def test_the_lowest_bits_of_a_seed_of_any_size_count(seed, same):
    assert (jax.random.key_data(seed_key(seed)) == jax.random.key_data(jax.random.key(same))).all()
