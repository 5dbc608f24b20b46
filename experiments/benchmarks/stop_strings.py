"""Decoding that ends at a string, which may be spelled by several tokens and end in the middle of one."""

import bisect
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

import specmq_jax as sm
from specmq_jax.decoding.tickets import rounds_until

_ROUNDS = 16
"""Between two looks at the text: few enough to waste little behind the string, many enough to hide the visit to the host."""

Text = Callable[[Sequence[int]], str]


def generate(decoder: sm.Decoder, prompt_ids: Sequence[int], max_new_tokens: int, strings: Sequence[str], text: Text
             ) -> sm.Generation:
    """Like `Decoder.generate`, ended with the token that completes the first of the strings.

    Nothing behind that token counts: rounds after its own are left out, and of the rounds since the last look at the text the
    time, and of a hierarchical drafter's inner rounds the number, in proportion.

    Args:
      decoder: of any method.
      prompt_ids: token ids.
      max_new_tokens: where decoding ends at the latest.
      strings: each ends the output.
      text: what token ids spell.

    Raises:
      UserError: as `Decoder.generate`.
    """
    state, prefill_seconds, draft_prefill_seconds = decoder.timed_prefill(prompt_ids, max_new_tokens)
    (device,) = state.length.devices()
    most = jax.device_put(np.int32(_ROUNDS), device)
    seconds, rounds, inner = 0.0, 0, 0
    while True:
        start = time.perf_counter()
        state = jax.block_until_ready(decoder.loop(decoder.params, state, most))
        elapsed = time.perf_counter() - start
        tokens = np.asarray(state.tokens)[len(prompt_ids):int(state.length)]
        accept_lengths = np.asarray(state.accept_lengths)[:int(state.rounds)]
        inner_lengths = decoder.drafter.accept_lengths(state.drafter)
        end = completion(tokens.tolist(), strings, text)
        if end is not None or bool(state.done):
            break
        seconds, rounds, inner = seconds + elapsed, len(accept_lengths), len(inner_lengths)
    kept = len(accept_lengths) if end is None else rounds_until(end, accept_lengths)
    share = (kept - rounds) / max(len(accept_lengths) - rounds, 1) if end is not None else 1.0
    kept_inner = inner + round(share * (len(inner_lengths) - inner))
    stopped = end is None and (int(state.length) < int(state.limit) or int(tokens[-1]) in decoder.config.stop_tokens)
    return sm.Generation(tokens=tokens[:end], accept_lengths=accept_lengths[:kept], seconds=seconds + share * elapsed,
                         prefill_seconds=prefill_seconds, draft_prefill_seconds=draft_prefill_seconds, stopped=stopped,
                         draft_accept_lengths=inner_lengths[:kept_inner])


def completion(token_ids: Sequence[int], strings: Sequence[str], text: Text) -> int | None:
    """How many of the tokens spell the first of the strings to its end; None where none is spelled."""

    def holds(count: int) -> bool:
        spelled = text(token_ids[:count])
        return any(string in spelled for string in strings)

    if not holds(len(token_ids)):
        return None
    return 1 + bisect.bisect_left(range(1, len(token_ids)), True, key=holds)


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings."""
    places = [place for string in strings if (place := text.find(string)) >= 0]
    return text[:min(places)] if places else text
