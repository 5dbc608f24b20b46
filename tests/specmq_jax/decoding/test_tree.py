"""DraftTree: masks, and acceptance against a plain-Python walk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmq_jax.decoding.tree import DraftTree

from_parents = jax.jit(DraftTree.from_parents, static_argnames="max_depth")


def random_tree(rng: np.random.Generator, size: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    parent = np.array([0] + [int(rng.integers(0, i)) for i in range(1, size)], np.int32)
    tokens = np.zeros(size, np.int32)
    tokens[0] = rng.integers(vocab)
    for node in range(size):
        children = np.flatnonzero(parent[1:] == node) + 1
        tokens[children] = rng.permutation(max(vocab, len(children)))[:len(children)]
    return tokens, parent


def walk(tokens: np.ndarray, parent: np.ndarray, targets: np.ndarray) -> list[int]:
    path = [0]
    while True:
        following = [i for i in range(1, len(tokens)) if parent[i] == path[-1] and tokens[i] == targets[path[-1]]]
        if not following:
            return path
        path.append(following[0])


@pytest.mark.parametrize("size", [1, 2, 7, 33, 60, 100])
def test_accept_walks_to_the_child_that_carries_the_targets_token(size):
    rng, accept = np.random.default_rng(size), jax.jit(DraftTree.accept)
    for _ in range(10):
        tokens, parent = random_tree(rng, size, vocab=4)
        targets = rng.integers(0, 4, size).astype(np.int32)
        tree = from_parents(jnp.asarray(tokens), jnp.asarray(parent), max_depth=size - 1)
        accepted = accept(tree, jnp.asarray(targets))
        path = walk(tokens, parent, targets)
        assert int(accepted.count) == len(path)
        assert accepted.path[:len(path)].tolist() == path
        assert accepted.nodes[:len(path)].tolist() == tokens[path].tolist()
        assert accepted.tokens[:len(path)].tolist() == targets[path].tolist()


@pytest.mark.parametrize("size", [1, 5, 64, 100])
def test_mask_holds_each_node_and_its_ancestors(size):
    tokens, parent = random_tree(np.random.default_rng(0), size, vocab=9)
    tree = from_parents(jnp.asarray(tokens), jnp.asarray(parent), max_depth=size - 1)
    for node in range(size):
        ancestors, at = {node}, node
        while at:
            at = int(parent[at])
            ancestors.add(at)
        assert set(np.flatnonzero(tree.mask[node])) == ancestors
        assert int(tree.depth[node]) == len(ancestors) - 1


def test_a_chain_is_the_tree_whose_parents_are_the_nodes_before():
    tokens = jnp.array([5, 1, 2, 3], jnp.int32)
    chain = DraftTree.chain(tokens)
    tree = from_parents(tokens, jnp.array([0, 0, 1, 2], jnp.int32), max_depth=3)
    assert chain.mask.tolist() == tree.mask.tolist() and chain.depth.tolist() == tree.depth.tolist()
    accepted = chain.accept(jnp.array([1, 2, 9, 9], jnp.int32))
    assert int(accepted.count) == 3 and accepted.tokens[:3].tolist() == [1, 2, 9]
