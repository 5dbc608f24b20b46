"""Plain decoding: a tree of the root alone."""

import dataclasses

import numpy as np
from jaxtyping import Array, Float, Int32

from specmq_jax.decoding.tree import Accepted, DraftTree
from specmq_jax.network.config import LlamaConfig


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NoDrafter:
    """Proposes nothing, so that each round commits the target's one next token."""

    params: tuple[()] = ()
    capture: tuple[int, ...] = ()
    tree_size: int = 1
    scratch_rows: int = 0
    max_depth: int = 0
    resumes: bool = True

    def __repr__(self) -> str:
        return "NoDrafter()"

    def check(self, target: LlamaConfig, *, max_len: int | None = None) -> None:
        del target, max_len

    def init(self, max_len: int, *, limit: int | None = None) -> tuple[()]:
        del max_len, limit
        return ()

    def prefill(self, params: tuple[()], state: tuple[()], tokens: Int32[Array, "M"], next_tokens: Int32[Array, "M"],
                features: Float[Array, "M F"], count: Int32[Array, ""]) -> tuple[()]:
        del params, tokens, next_tokens, features, count
        return state

    def propose(self, params: tuple[()], state: tuple[()], root: Int32[Array, ""]) -> tuple[DraftTree, tuple[()]]:
        del params
        return DraftTree.chain(root[None]), state

    def advance(self, params: tuple[()], state: tuple[()], accepted: Accepted) -> tuple[()]:
        del params, accepted
        return state

    def accept_lengths(self, state: tuple[()]) -> Int32[np.ndarray, "n"]:
        del state
        return np.zeros(0, np.int32)
