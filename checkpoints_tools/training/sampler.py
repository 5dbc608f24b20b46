"""Answers to many prompts at once: a fixed number of slots, each refilled as soon as its answer has ended."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.norm import RowScale
from pallas_kernels.rope import api as rope_kernels
from specmq_jax.decoding.verification import are_sound
from specmq_jax.errors import NotFiniteError
from specmq_jax.loading.model import Params
from specmq_jax.network.config import LlamaConfig, View
from specmq_jax.network.llama import Llama
from specmq_jax.network.rows import Rows
from specmq_jax.network.sequences import Sequences, attention, refuse_view

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
class SlotLayer:
    """One layer's keys and values of B sequences.

    Attributes:
      keys, values: float[B, kv_heads, L, head_dim].
    """

    keys: Float[Array, "B H L d"]
    values: Float[Array, "B H L d"]

    def append(self, qkv: Float[Array, "1 B F"], rows: Rows, config: LlamaConfig, row_scale: RowScale | None, *,
               implementation: str | None = None) -> tuple[Float[Array, "B Hq d"], Self]:
        del implementation  # there is one
        query, key, value = rope_kernels.rotated(qkv, rows.cos, rows.sin, heads=config.num_heads,
                                                 kv_heads=config.num_kv_heads, head_dim=config.head_dim,
                                                 dtype=self.keys.dtype, row_scale=row_scale)
        place = jnp.arange(len(query)), slice(None), rows.start
        return query, self.replace(keys=self.keys.at[place].set(key), values=self.values.at[place].set(value))

    def attend(self, query: Float[Array, "B Hq d"], rows: Rows, view: View, *, implementation: str | None = None
               ) -> Float[Array, "B Hq d"]:
        del implementation
        refuse_view(view)
        return attention(query[:, None], self.keys, self.values, rows.mask)[:, 0]

    def put(self, slots: Int32[Array, "P"], keys: Float[Array, "P H S d"], values: Float[Array, "P H S d"]) -> Self:
        """The rows of whole prompts in these slots; those of slots that there are not are dropped."""
        width = keys.shape[2]
        return self.replace(keys=self.keys.at[slots, :, :width].set(keys, mode="drop"),
                            values=self.values.at[slots, :, :width].set(values, mode="drop"))


@flax.struct.dataclass
class Slots:
    """B sequences, and the cache of a pass over the newest token of each.

    Attributes:
      tokens: i32[B, L], prompt and answer.
      length: i32[B], tokens that are there; the newest is not in the cache yet.
      limit: i32[B], the length at which the answer is cut.
      done: bool[B].
      layers: their keys and values.
    """

    tokens: Int32[Array, "B L"]
    length: Int32[Array, "B"]
    limit: Int32[Array, "B"]
    done: Bool[Array, "B"]
    layers: tuple[SlotLayer, ...]

    def rows(self, config: LlamaConfig, count: int, offsets: None = None, mask: None = None, *, skip: int = 0,
             reproducible: bool = False) -> Rows:
        del count, offsets, mask, skip, reproducible
        newest, room = self.length - 1, self.tokens.shape[1]
        seen = jnp.arange(room) <= newest[:, None]
        return Rows.among(config, newest, seen[:, None], limit=room, start=newest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to answer.

    Attributes:
      module: the model's, dense.
      slots: sequences decoded side by side.
      max_len: tokens of prompt and answer that a slot holds.
      max_new_tokens: of an answer.
      stop_tokens: ids that end it.
      temperature: 0 takes the best token, else one is drawn.
      admitted: prompts taken in by one pass.
      steps: decoded between two looks at what has ended.
    """

    module: Llama
    slots: int
    max_len: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 0.0
    admitted: int = 32
    steps: int = 16

    def run(self, params: Params, requests: Iterable[Request], *, seed: int = 0,
            follow_up: Callable[[Completion], Request | None] = lambda _: None) -> Iterator[Completion]:
        """Answers all requests, in the order in which their answers end.

        Args:
          params: the model's.
          requests: prompts of fewer than `max_len` tokens.
          seed: of the drawing.
          follow_up: may give one request more for a completion.

        Raises:
          NotFiniteError: the model's state at a token is not finite.
        """
        waiting = collections.deque(requests)
        held: list[Request | None] = [None] * self.slots
        state = self._empty()
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

    def _empty(self) -> Slots:
        config, dtype = self.module.config, self.module.format.dtype
        shape = (self.slots, config.num_kv_heads, self.max_len, config.head_dim)
        layers = tuple(SlotLayer(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
        return Slots(tokens=jnp.zeros((self.slots, self.max_len), jnp.int32), length=jnp.ones(self.slots, jnp.int32),
                     limit=jnp.ones(self.slots, jnp.int32), done=jnp.ones(self.slots, bool), layers=layers)

    def _admit(self, params: Params, state: Slots, taken: list[tuple[int, Request]], key: Array) -> Slots:
        longest = max(len(request.prompt) for _, request in taken)
        width = min(self.max_len, max(64, 1 << (longest - 1).bit_length()))
        prompts, counts = np.zeros((self.admitted, width), np.int32), np.ones(self.admitted, np.int32)
        slots = np.full(self.admitted, self.slots, np.int32)  # out of range: rows of padding are dropped
        for row, (slot, request) in enumerate(taken):
            prompts[row, :len(request.prompt)] = request.prompt
            counts[row], slots[row] = len(request.prompt), slot
        return _prefill(self, params, state, slots, prompts, counts, key)

    def _draw(self, params: Params, hidden: Array, key: Array) -> Int32[Array, "B"]:
        """A token a row, `_NONE` behind a state that is not finite."""
        logits = self.module.apply(params, hidden, method="logits")
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
def _prefill(sampler: Sampler, params: Params, state: Slots, slots: Int32[Array, "P"],
             prompts: Int32[Array, "P S"], counts: Int32[Array, "P"], key: Array) -> Slots:
    """Puts prompts into slots and draws the first token of each answer."""
    count, width = prompts.shape
    module = sampler.module
    sequences = Sequences.causal(module.config, count, width, module.format.dtype, limit=sampler.max_len)
    hidden, _, sequences = module.apply(params, prompts.reshape(-1), sequences)
    first = sampler._draw(params, hidden[jnp.arange(count) * width + counts - 1], key)
    rows = jnp.pad(prompts, ((0, 0), (0, sampler.max_len - width))).at[jnp.arange(count), counts].set(first)
    limit = jnp.minimum(counts + sampler.max_new_tokens, sampler.max_len)
    return state.replace(
        tokens=state.tokens.at[slots].set(rows, mode="drop"), length=state.length.at[slots].set(counts + 1, mode="drop"),
        limit=state.limit.at[slots].set(limit, mode="drop"),
        done=state.done.at[slots].set(sampler._stops(first) | (counts + 1 >= limit), mode="drop"),
        layers=tuple(layer.put(slots, made.keys[0], made.values[0])
                     for layer, made in zip(state.layers, sequences.layers, strict=True)))


@jax.jit(static_argnums=0, donate_argnums=2)
def _decode(sampler: Sampler, params: Params, state: Slots, key: Array) -> Slots:
    """`sampler.steps` tokens more in every slot that is not done."""
    every = jnp.arange(sampler.slots)

    def step(i: Array, state: Slots) -> Slots:
        hidden, _, state = sampler.module.apply(params, state.tokens[every, state.length - 1], state)
        token = sampler._draw(params, hidden, jax.random.fold_in(key, i))
        length = state.length + ~state.done
        tokens = state.tokens.at[every, jnp.where(state.done, sampler.max_len, state.length)].set(token, mode="drop")
        done = state.done | sampler._stops(token) | (length >= state.limit)
        return state.replace(tokens=tokens, length=length, done=done)

    return jax.lax.fori_loop(0, sampler.steps, step, state)
