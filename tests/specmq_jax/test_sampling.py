"""Sampling: filters against their definition, noise keyed by position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmq_jax import Greedy, Sampling, UserError


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
    key, sampling = jax.random.key(3), Sampling(temperature=0.7)
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    together = sampling(logits, jnp.arange(10, 16), key)
    alone = [int(sampling(logits[i:i + 1], jnp.array([10 + i]), key)[0]) for i in range(6)]
    assert together.tolist() == alone
    same = sampling(jnp.tile(logits[:1], (6, 1)), jnp.full(6, 4), key)
    assert len(set(same.tolist())) == 1


def test_greedy_takes_the_lower_id_of_a_tie():
    assert Greedy()(jnp.array([[1.0, 2.0, 2.0]]), jnp.array([0]), jax.random.key(0)).tolist() == [1]


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "temperature must be above 0; found 0.0"), ({"top_k": -1}, "top_k must be 0 or more"),
    ({"top_p": 0.0}, "top_p must lie in")])
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
