"""Many sequences in code that is written for one.

Drafters, verification and rounds are functions of one sequence. `jax.vmap` makes them functions of N; what is here says how:
a pass of a network becomes one pass over the rows of all, one sequence behind the other, and the rows of caches, which hold
every slot, are mapped by nobody and copied by nobody.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int32, PyTree

from specmq_jax.network.cache import KVCache, StoredLayer
from specmq_jax.network.module import Module


def apply(module: Module, params: Any, *inputs: Any, **options: Any) -> Any:
    """`module.apply(params, *inputs, **options)`; under `vmap` a single pass.

    The inputs' arrays and the outputs' have a row an entry of their first axis; caches are `KVCache`s.
    """
    @custom_vmap
    def one(params: Any, *inputs: Any) -> Any:
        return module.apply(params, *inputs, **options)

    @one.def_vmap
    def all_(sequences: int, batched: Any, params: Any, *inputs: Any) -> tuple[Any, Any]:
        rows = [_joined(sequences, *each) for each in zip(inputs, batched[1:], strict=True)]
        out = apply(module, params, *rows, **options)
        return _separate(sequences, out), _flags(out)

    return one(params, *inputs)


def axes(state: PyTree) -> PyTree:
    """What `vmap` takes as the axes of a state: the first one, but for the rows of caches."""
    return jax.tree.map(lambda leaf: None if isinstance(leaf, StoredLayer) else 0, state, is_leaf=_is_layer)


def in_slots(state: PyTree, count: int) -> PyTree:
    """A state of so many sequences, each an empty one as that given of one; without rows where it has none."""
    def one(part: Any) -> Any:
        if not isinstance(part, KVCache):
            return jnp.broadcast_to(part, (count, *jnp.shape(part)))
        layers = jax.tree.map(lambda rows: jnp.zeros((count, *rows.shape), rows.dtype), part.layers)
        return part.replace(layers=layers, length=jnp.broadcast_to(part.length, (count,)),
                            slot=jnp.arange(count, dtype=jnp.int32))

    return jax.tree.map(one, state, is_leaf=_is_cache)


def take(state: PyTree, slots: Int32[Array, "*N"] | int) -> PyTree:
    """What some slots hold, or one; the rows of caches stay where they are."""
    return jax.tree.map(lambda leaf: leaf if _is_layer(leaf) else leaf[slots], state, is_leaf=_is_layer)


def put(state: PyTree, part: PyTree, slots: Int32[Array, "*N"]) -> PyTree:
    """The state of all slots in which some have what `take` gave, changed since."""
    return jax.tree.map(lambda whole, leaf: leaf if _is_layer(leaf) else whole.at[slots].set(leaf), state, part,
                        is_leaf=_is_layer)


def emptied(part: PyTree, empty: PyTree, where: Bool[Array, ""], length: Int32[Array, ""]) -> PyTree:
    """One sequence's state or, where it is asked for, an empty one as that given, in the same slot, whose caches keep so many
    rows."""
    def one(part: Any, empty: Any) -> Any:
        if isinstance(part, KVCache):
            return part.rewind(jnp.where(where, length, part.length))
        return jnp.where(_aligned(where, part), empty, part)

    return jax.tree.map(one, part, empty, is_leaf=_is_cache)


def select(chosen: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """A sequence's new state or its old one. Rows of caches are the new ones: what is written behind a length is scratch."""
    def one(new: Any, old: Any) -> Any:
        return new if _is_layer(new) else jnp.where(_aligned(chosen, new), new, old)

    return jax.tree.map(one, new, old, is_leaf=_is_layer)


def repeat_until_done(is_unfinished: Callable[[Any], Bool[Array, ""]], body: Callable[[Any], Any], carry: PyTree) -> PyTree:
    """`jax.lax.while_loop`; under `vmap` it goes on until every sequence is through, and those that are keep their state."""
    @custom_vmap
    def one(carry: PyTree) -> PyTree:
        return jax.lax.while_loop(is_unfinished, body, carry)

    @one.def_vmap
    def all_(sequences: int, batched: Any, carry: PyTree) -> tuple[PyTree, PyTree]:
        carry = _spread(sequences, carry, batched[0])
        each = axes(carry)

        def turn(carry: PyTree) -> PyTree:
            return jax.vmap(lambda one: select(is_unfinished(one), body(one), one), in_axes=(each,), out_axes=each)(carry)

        out = jax.lax.while_loop(lambda carry: jax.vmap(is_unfinished, in_axes=(each,))(carry).any(), turn, carry)
        return out, _flags(out)

    return one(carry)


def do_where(chosen: Bool[Array, ""], do: Callable[..., PyTree], state: PyTree, *others: PyTree) -> PyTree:
    """`do(state, *others)` where it is chosen, else the state; under `vmap` it is done for all sequences if for any."""
    @custom_vmap
    def one(chosen: Bool[Array, ""], state: PyTree, *others: PyTree) -> PyTree:
        return jax.lax.cond(chosen, do, lambda state, *_: state, state, *others)

    @one.def_vmap
    def all_(sequences: int, batched: Any, *arguments: Any) -> tuple[PyTree, PyTree]:
        chosen, state, *others = (_spread(sequences, *each) for each in zip(arguments, batched, strict=True))
        each = axes(state)

        def selected(chosen: Array, state: PyTree, *others: PyTree) -> PyTree:
            return select(chosen, do(state, *others), state)

        done = jax.vmap(selected, in_axes=(0, each, *map(axes, others)), out_axes=each)
        out = jax.lax.cond(chosen.any(), done, lambda _, state, *__: state, chosen, state, *others)
        return out, _flags(out)

    return one(chosen, state, *others)


def _is_layer(leaf: Any) -> bool:
    return isinstance(leaf, StoredLayer)


def _is_cache(part: Any) -> bool:
    return isinstance(part, KVCache)


def _flags(tree: PyTree) -> PyTree:
    """Which leaves of what a rule returns are mapped: all but the rows of caches."""
    return jax.tree.map(lambda leaf: jax.tree.map(lambda _: False, leaf) if _is_layer(leaf) else True, tree, is_leaf=_is_layer)


def _spread(sequences: int, tree: PyTree, batched: PyTree) -> PyTree:
    """The same with every leaf mapped but the rows of caches."""
    def one(leaf: Any, is_batched: Any) -> Any:
        if _is_layer(leaf):
            assert not any(jax.tree.leaves(is_batched)), "the rows of a cache hold every slot, and are not mapped"
            return leaf
        return leaf if is_batched else jnp.broadcast_to(leaf, (sequences, *jnp.shape(leaf)))

    return jax.tree.map(one, tree, batched, is_leaf=_is_layer)


def _joined(sequences: int, tree: PyTree, batched: PyTree) -> PyTree:
    """Inputs of a pass over the rows of all sequences; a cache is that of all of them."""
    def one(part: Any) -> Any:
        return part if isinstance(part, KVCache) else part.reshape(-1, *part.shape[2:])

    return jax.tree.map(one, _spread(sequences, tree, batched), is_leaf=_is_cache)


def _separate(sequences: int, out: PyTree) -> PyTree:
    """What such a pass returns, a sequence an entry of the first axis."""
    def one(part: Any) -> Any:
        return part if isinstance(part, KVCache) else part.reshape(sequences, -1, *part.shape[1:])

    return jax.tree.map(one, out, is_leaf=_is_cache)


def _aligned(chosen: Bool[Array, ""], like: Array) -> Array:
    return jnp.broadcast_to(chosen, jnp.shape(like))
