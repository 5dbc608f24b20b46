"""Measures what a precision costs: python -m checkpoints_tools.perplexity MODEL --text=FILE [--precision=NAME] [--length=N]

MODEL is anything that sm.load reads. The text is cut into windows of N tokens that do not overlap, and every token of a window
but its first is scored, given those before it in the window. A BOS stands where the tokenizer puts one, at the beginning of a
document; none is added to a window. FILE is plain text or JSON lines, as checkpoints_tools.quantize takes them.
"""

import functools
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int32
from rich.console import Console
from rich.progress import track

import specmq_jax as sm
from checkpoints_tools import arguments
from checkpoints_tools.quantizers.calibration import read_tokens
from specmq_jax import formats
from specmq_jax.commands import entry
from specmq_jax.errors import NotFiniteError, UserError
from specmq_jax.loading.model import Params, check_tokens, outline
from specmq_jax.network.cache import KVCache
from specmq_jax.network.config import LlamaConfig
from specmq_jax.network.llama import Llama
from specmq_jax.tokenizer import load_tokenizer
from specmq_jax.words import count

_ROWS = 256  # of logits at a time: 256 x 128256 in f32 are 131 MB


class Perplexity(NamedTuple):
    """`value` is exp of the mean negative log-likelihood of `tokens` scored tokens; `seconds` the passes took."""

    value: float
    tokens: int
    seconds: float


def perplexity(model: sm.Model, tokens: Sequence[int] | Int32[np.ndarray, "n"], length: int) -> Perplexity:
    """The perplexity of a text in windows of `length` tokens that do not overlap; the last one may be shorter.

    The first token of a window is not scored. The logits of some rows are held at a time.

    Raises:
      UserError: a length below 2 or above the model's positions, a single token, or an id outside the vocabulary.
      NotFiniteError: the scores behind a token are not finite.
    """
    check_length(length, model.config)
    ids = check_tokens(tokens, model.config)
    if len(ids) < 2:
        raise UserError("the text has one token, and the first of a window is not scored; give a longer text")
    start, total, scored = time.perf_counter(), 0.0, 0
    for begin in track(range(0, len(ids), length), description="perplexity", console=Console(stderr=True), transient=True):
        window = ids[begin:begin + length]
        padded = jnp.asarray(np.pad(window, (0, length - len(window))))  # causal rows don't see what follows them
        losses = _losses(model.module, model.params, padded, model.new_cache(length))
        scores = np.asarray(losses)[:len(window) - 1]
        if not np.isfinite(scores).all():
            place = begin + int(np.argmin(np.isfinite(scores)))
            raise NotFiniteError(f"the model's scores behind token {place + 1} of the text (id {ids[place]}) are not finite: a "
                                 "weight is not, or activations leave their dtype's range; choose --precision=bf16 or fp32",
                                 position=place)
        total += float(np.sum(scores, dtype=np.float64))
        scored += len(window) - 1
    return Perplexity(float(np.exp(total / scored)), scored, time.perf_counter() - start)


def check_length(length: int, config: LlamaConfig) -> None:
    """Raises a `UserError` where a model can't score windows of `length` tokens."""
    if not 2 <= length <= config.max_position:
        raise UserError(f"windows of {length} tokens can't be scored; choose a length from 2 to the model's "
                        f"{config.max_position} positions")


@functools.partial(jax.jit, static_argnames="module")
def _losses(module: Llama, params: Params, tokens: Int32[Array, "S"], cache: KVCache) -> Float[Array, "S"]:
    """Negative log-likelihoods of the tokens behind each one; the last is of no use."""
    hidden, _, _ = module.apply(params, tokens, cache)
    following = jnp.roll(tokens, -1)
    padding = -len(tokens) % _ROWS
    blocks = (jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, _ROWS, hidden.shape[1]),
              jnp.pad(following, (0, padding)).reshape(-1, _ROWS))

    def score(block: tuple[Array, Array]) -> Float[Array, "R"]:
        logits = module.apply(params, block[0], method="logits").astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, block[1][:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    return jax.lax.map(score, blocks).reshape(-1)[:len(tokens)]


def main(argv: Sequence[str]) -> None:
    usage = "python -m checkpoints_tools.perplexity MODEL --text=FILE"
    (source,) = arguments.arguments(argv, usage, 1)
    given = flags.FLAGS
    if not given.text:
        raise UserError(f"--text=FILE is missing; usage: {usage}")
    shapes = outline(source, given.precision)
    length = given.length or min(2048, shapes.config.max_position)
    check_length(length, shapes.config)
    tokens = check_tokens(read_tokens(pathlib.Path(given.text), load_tokenizer(shapes.directory)), shapes.config)
    model = sm.load(shapes.directory, given.precision)
    found = perplexity(model, tokens, length)
    print(f"perplexity {found.value:.4f} | {count(found.tokens, 'token')} in windows of {length} | {model.precision} | "
          f"{found.seconds:.1f} s")


if __name__ == "__main__":
    flags.DEFINE_string("text", None, "Text file, or .jsonl file with a text or turns in each line.")
    flags.DEFINE_string("precision", None, "Precision to round the linear weights to at load; one of "
                        f"{', '.join(formats.names())}. Default: as stored.")
    flags.DEFINE_integer("length", None, "Tokens in a window. Default: 2048, or the model's positions if those are fewer.",
                         lower_bound=2)
    entry.run(main)
