"""Answers to many prompts at once: a fixed number of slots, each refilled as soon as its answer has ended."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from checkpoints_tools.training import batched
from specmq_jax.decoding.verification import are_sound
from specmq_jax.errors import NotFiniteError
from specmq_jax.network.config import LlamaConfig

_NONE = -1
"""Stands for a token that can't be drawn, and ends its answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt that awaits its answer; `key` is the caller's name for it."""

    key: Any
    prompt: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of a request: `tokens` are the answer's, a stop token included if one came."""

    request: Request
    tokens: Int32[np.ndarray, "n"]


@flax.struct.dataclass
class Slots:
    """B sequences.

    Attributes:
      tokens: i32[B, L], prompt and answer.
      length: i32[B], tokens that are there; the newest is not in the cache yet.
      limit: i32[B], the length at which the answer is cut.
      done: bool[B].
      keys, values: per layer, [B, kv_heads, L, head_dim].
    """

    tokens: Int32[Array, "B L"]
    length: Int32[Array, "B"]
    limit: Int32[Array, "B"]
    done: Bool[Array, "B"]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to answer.

    Attributes:
      config: the model's.
      slots: sequences decoded side by side.
      max_len: tokens of prompt and answer that a slot holds.
      max_new_tokens: of an answer.
      stop_tokens: ids that end it.
      temperature: 0 takes the best token, else one is drawn.
      admitted: prompts taken in by one pass.
      steps: decoded between two looks at what has ended.
    """

    config: LlamaConfig
    slots: int
    max_len: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 0.0
    admitted: int = 32
    steps: int = 16

    def run(self, params: batched.Params, requests: Iterable[Request], *, seed: int = 0,
            follow_up: Callable[[Completion], Request | None] = lambda _: None) -> Iterator[Completion]:
        """Answers all requests, in the order in which their answers end.

        Args:
          params: as `batched.dense_parameters` gives them.
          requests: prompts of fewer than `max_len` tokens.
          seed: of the drawing.
          follow_up: may give one request more for a completion.

        Raises:
          NotFiniteError: the model's state at a token is not finite.
        """
        waiting = collections.deque(requests)
        held: list[Request | None] = [None] * self.slots
        state = self._empty(params)
        keys = map(functools.partial(jax.random.fold_in, jax.random.key(seed)), itertools.count())
        while True:
            free = [slot for slot, request in enumerate(held) if request is None]
            while waiting and free:
                taken = [(free.pop(), waiting.popleft()) for _ in range(min(len(free), len(waiting), self.admitted))]
                for slot, request in taken:
                    held[slot] = request
                state = self._admit(params, state, taken, next(keys))
            if not any(held):
                return
            state = _decode(self, params, state, next(keys))
            done, length = np.asarray(state.done), np.asarray(state.length)
            ended = [slot for slot, request in enumerate(held) if request is not None and done[slot]]
            if not ended:
                continue
            rows = np.asarray(state.tokens)
            for slot in ended:
                request = held[slot]
                held[slot] = None
                completion = Completion(request=request, tokens=rows[slot, len(request.prompt):length[slot]].copy())
                _check(completion)
                if (another := follow_up(completion)) is not None:
                    waiting.appendleft(another)
                yield completion

    def _empty(self, params: batched.Params) -> Slots:
        shape = (self.slots, self.config.num_kv_heads, self.max_len, self.config.head_dim)
        dtype = params["layers_0"]["attention"]["qkv"]["w"].dtype
        caches = [tuple(jnp.zeros(shape, dtype) for _ in range(self.config.num_layers)) for _ in range(2)]
        return Slots(tokens=jnp.zeros((self.slots, self.max_len), jnp.int32), length=jnp.ones(self.slots, jnp.int32),
                     limit=jnp.ones(self.slots, jnp.int32), done=jnp.ones(self.slots, bool), keys=caches[0],
                     values=caches[1])

    def _admit(self, params: batched.Params, state: Slots, taken: list[tuple[int, Request]], key: Array) -> Slots:
        longest = max(len(request.prompt) for _, request in taken)
        width = min(self.max_len, max(64, 1 << (longest - 1).bit_length()))
        prompts, counts = np.zeros((self.admitted, width), np.int32), np.ones(self.admitted, np.int32)
        slots = np.full(self.admitted, self.slots, np.int32)  # out of range: rows of padding are dropped
        for row, (slot, request) in enumerate(taken):
            prompts[row, :len(request.prompt)] = request.prompt
            counts[row], slots[row] = len(request.prompt), slot
        return _prefill(self, params, state, slots, prompts, counts, key)

    def _draw(self, params: batched.Params, hidden: Array, key: Array) -> Int32[Array, "B"]:
        """A token a row, `_NONE` behind a state that is not finite."""
        logits = batched.target_logits(params, hidden)
        if self.temperature:
            drawn = jax.random.categorical(key, logits / self.temperature, axis=-1).astype(jnp.int32)
        else:
            drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jnp.where(are_sound(logits, drawn), drawn, _NONE)

    def _stops(self, tokens: Int32[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.isin(tokens, jnp.asarray((*self.stop_tokens, _NONE)))


def _check(completion: Completion) -> None:
    *before, last = completion.tokens.tolist()
    if last != _NONE:
        return
    place = (f"token {len(before)} of an answer (id {before[-1]})" if before else
             f"a token of a prompt of {len(completion.request.prompt)}")
    raise NotFiniteError(f"the model's state at {place} is not finite: a weight is not, or activations leave the range of "
                         "their dtype; train with --precision=bf16 or fp32",
                         position=len(completion.request.prompt) + len(before) - 1, tokens=before)


@jax.jit(static_argnums=0, donate_argnums=2)
def _prefill(sampler: Sampler, params: batched.Params, state: Slots, slots: Int32[Array, "P"],
             prompts: Int32[Array, "P S"], counts: Int32[Array, "P"], key: Array) -> Slots:
    """Puts prompts into slots and draws the first token of each answer."""
    count, width = prompts.shape
    mask = jnp.tri(width, dtype=bool)[None]
    keys, values = list(state.keys), list(state.values)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        k, v = batched.heads_first(k), batched.heads_first(v)
        keys[layer] = keys[layer].at[slots, :, :width].set(k, mode="drop")
        values[layer] = values[layer].at[slots, :, :width].set(v, mode="drop")
        return batched.attention(q, k, v, mask)

    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    hidden, _ = batched.target_states(sampler.config, params, prompts, positions, attend, length=sampler.max_len)
    first = sampler._draw(params, hidden[jnp.arange(count), counts - 1], key)
    rows = jnp.pad(prompts, ((0, 0), (0, sampler.max_len - width))).at[jnp.arange(count), counts].set(first)
    limit = jnp.minimum(counts + sampler.max_new_tokens, sampler.max_len)
    return state.replace(
        tokens=state.tokens.at[slots].set(rows, mode="drop"), length=state.length.at[slots].set(counts + 1, mode="drop"),
        limit=state.limit.at[slots].set(limit, mode="drop"),
        done=state.done.at[slots].set(sampler._stops(first) | (counts + 1 >= limit), mode="drop"),
        keys=tuple(keys), values=tuple(values))


@jax.jit(static_argnums=0, donate_argnums=2)
def _decode(sampler: Sampler, params: batched.Params, state: Slots, key: Array) -> Slots:
    """`sampler.steps` tokens more in every slot that is not done."""
    every = jnp.arange(sampler.slots)

    def step(i: Array, state: Slots) -> Slots:
        keys, values, position = list(state.keys), list(state.values), state.length - 1
        mask = (jnp.arange(sampler.max_len) <= position[:, None])[:, None]

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            keys[layer] = keys[layer].at[every, :, position].set(k[:, 0])
            values[layer] = values[layer].at[every, :, position].set(v[:, 0])
            return batched.attention(q, keys[layer], values[layer], mask)

        hidden, _ = batched.target_states(sampler.config, params, state.tokens[every, position][:, None],
                                          position[:, None], attend, length=sampler.max_len)
        token = sampler._draw(params, hidden[:, 0], jax.random.fold_in(key, i))
        length = state.length + ~state.done
        tokens = state.tokens.at[every, jnp.where(state.done, sampler.max_len, state.length)].set(token, mode="drop")
        done = state.done | sampler._stops(token) | (length >= state.limit)
        return state.replace(tokens=tokens, length=length, done=done, keys=tuple(keys), values=tuple(values))

    return jax.lax.fori_loop(0, sampler.steps, step, state)
