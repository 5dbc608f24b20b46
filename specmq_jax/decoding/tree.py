"""The tree of drafted tokens that one verification pass checks."""

from typing import Self

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class Accepted(flax.struct.PyTreeNode):
    """What a verification kept, in slots of the deepest possible path; slots from `count` on are padding.

    Attributes:
      path: i32[D + 1], node at each depth of the accepted path, root first.
      nodes: i32[D + 1], the drafted tokens of those nodes (the root's is the newest committed token).
      tokens: i32[D + 1], the tokens the round commits: the target's choice after each node of the path, so the accepted
        drafts and then one bonus token.
      count: i32 scalar, how many tokens that is: the accept length, at least 1.
      features: float[D + 1, F] or None, the target's hidden states at the path's nodes, for drafters that read them.
      sound: bool[D + 1] or None, whether the target's scores at each node of the path are finite; a token drawn from others
        means nothing.
    """

    path: Int32[Array, "P"]
    nodes: Int32[Array, "P"]
    tokens: Int32[Array, "P"]
    count: Int32[Array, ""]
    features: Float[Array, "P F"] | None = None
    sound: Bool[Array, "P"] | None = None


class DraftTree(flax.struct.PyTreeNode):
    """T drafted tokens; node 0 is the newest committed token, parents precede children, siblings differ.

    Attributes:
      tokens: i32[T]; -1 marks a node that is padding, which no target chooses.
      parent: i32[T], index of each node's parent; the root's is 0.
      depth: i32[T], 0 for the root.
      mask: bool[T, T], mask[i, j] says that j is i or an ancestor of i.
      max_depth: static, the deepest level the tree can have.
      is_chain: static, parent[i] is i - 1.
    """

    tokens: Int32[Array, "T"]
    parent: Int32[Array, "T"]
    depth: Int32[Array, "T"]
    mask: Bool[Array, "T T"]
    max_depth: int = flax.struct.field(pytree_node=False)
    is_chain: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def size(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def chain(cls, tokens: Int32[Array, "T"]) -> Self:
        """A tree without branches; a single token is plain decoding."""
        index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        return cls(tokens=tokens, parent=jnp.maximum(index - 1, 0), depth=index, mask=index[:, None] >= index[None, :],
                   max_depth=tokens.shape[0] - 1, is_chain=True)

    @classmethod
    def from_parents(cls, tokens: Int32[Array, "T"], parent: Int32[Array, "T"], *, max_depth: int) -> Self:
        """Builds depth and mask; `parent[i] < i` for every node but the root."""
        mask, above = jnp.eye(tokens.shape[0], dtype=bool), parent
        for _ in range(max_depth.bit_length()):  # each turn doubles the generations that the mask holds
            mask, above = mask | mask[above], above[above]
        # The root is left out of the sum, not subtracted from it, which on a GPU would be a launch of its own.
        depth = jnp.sum(mask & (jnp.arange(tokens.shape[0]) > 0), axis=1, dtype=jnp.int32)
        return cls(tokens=tokens, parent=parent, depth=depth, mask=mask, max_depth=max_depth)

    def accept(self, targets: Int32[Array, "T"]) -> Accepted:
        """Walks from the root to children that carry the target's choice.

        Args:
          targets: i32[T], the token the target draws after each node.
        """
        right = (self.tokens == targets[self.parent]).at[0].set(True)
        alive = jnp.all(right[None, :] | ~self.mask, axis=1)
        length = jnp.where(alive, self.depth + 1, 0)
        best = jnp.argmax(length)
        levels = jnp.arange(self.max_depth + 1, dtype=jnp.int32)
        on_path = self.mask[best][None, :] & (self.depth[None, :] == levels[:, None])
        path = jnp.argmax(on_path, axis=1).astype(jnp.int32)
        return Accepted(path=path, nodes=self.tokens[path], tokens=targets[path], count=jnp.max(length))
