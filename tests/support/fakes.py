"""A tiny configuration, and a drafter with branching trees of any shape for tests of the rounds around it."""

import dataclasses
import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import specmq_jax as sm
from specmq_jax.decoding.tree import DraftTree

DATA = pathlib.Path(__file__).parents[1] / "data"


def tiny_config(**changes) -> sm.LlamaConfig:
    sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                 head_dim=16, max_position=512)
    return sm.LlamaConfig(**(sizes | changes))


def expanded(model: sm.Model, precision: str) -> sm.Model:
    """Of an fp32 model, what `load` makes on a CPU of an fp16 checkpoint of its weights."""
    return dataclasses.replace(model, precision="fp16").with_precision(precision)


@flax.struct.dataclass
class OracleState:
    position: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class OracleDrafter:
    """Knows the true continuation and puts it into random trees: each node carries the true token with chance `skill`
    (one child a parent), else a wrong one."""

    truth: np.ndarray
    parent: np.ndarray
    right: np.ndarray
    vocab: int
    capture: tuple = ()
    scratch_rows: int = 0

    @classmethod
    def random(cls, truth, *, size, vocab, skill, seed):
        rng = np.random.default_rng(seed)
        parent = np.array([0] + [int(rng.integers(max(0, i - 4), i)) for i in range(1, size)], np.int32)
        right = np.zeros(size, bool)
        for node in range(size):
            children = np.flatnonzero(parent[1:] == node) + 1
            if len(children) and (node == 0 or rng.random() < skill):
                right[rng.choice(children)] = True
        return cls(truth=np.asarray(truth, np.int32), parent=parent, right=right, vocab=vocab)

    @property
    def params(self):
        return jnp.asarray(np.pad(self.truth, (0, 256)))

    @property
    def tree_size(self):
        return len(self.parent)

    @property
    def max_depth(self):
        return self.tree_size - 1

    def check(self, target, *, max_len=None):
        del target, max_len

    def init(self, max_len, *, limit=None):
        del max_len, limit
        return OracleState(position=jnp.int32(0))

    def prefill(self, params, state, tokens, next_tokens, features, count):
        del params, tokens, next_tokens, features
        return OracleState(position=state.position + count)

    def propose(self, params, state, root):
        parent = jnp.asarray(self.parent)
        shape = DraftTree.from_parents(jnp.zeros_like(parent), parent, max_depth=self.max_depth)
        truth = params[state.position + shape.depth]
        rank = np.array([np.count_nonzero(self.parent[1:i] == self.parent[i]) for i in range(self.tree_size)], np.int32)
        tokens = jnp.where(jnp.asarray(self.right), truth, (truth + 1 + rank) % self.vocab)
        return shape.replace(tokens=tokens.at[0].set(root)), state

    def advance(self, params, state, accepted):
        del params
        return OracleState(position=state.position + accepted.count)

    def accept_lengths(self, state):
        del state
        return np.zeros(0, np.int32)
