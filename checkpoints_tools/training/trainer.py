"""The optimisation of a head, with checkpoints to go on from."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32
from rich.console import Console

from checkpoints_tools.training import rows as row_packing
from checkpoints_tools.training.answers import Sequences
from checkpoints_tools.training.checkpoints import Checkpoints
from checkpoints_tools.training.objective import Acceptance, Objective
from checkpoints_tools.training.rows import Rows
from specmq_jax.errors import UserError
from specmq_jax.files import put_text
from specmq_jax.loading.model import Params
from specmq_jax.words import count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
      steps: updates in all.
      batch: rows of an update.
      length: tokens of a row.
      learning_rate: at its peak, behind a warm-up of a twentieth of the steps; it falls to a hundredth on a cosine. A single
        step is one at the peak.
      evaluate_every, save_every: updates between two looks at the held-out rows, and between two checkpoints.
      seed: of the order of the rows.
    """

    steps: int
    batch: int
    length: int
    learning_rate: float = 1e-3
    evaluate_every: int = 250
    save_every: int = 250
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(self.rate(), b1=0.9, b2=0.95, weight_decay=0.01))

    def rate(self) -> optax.Schedule:
        """The learning rate of each step, counted from 0."""
        if self.steps == 1:  # no room for a warm-up, whose first rate is 0
            return optax.constant_schedule(self.learning_rate)
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(1, self.steps // 20), self.steps,
                                                  self.learning_rate / 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Parameters, what they reach on the held-out rows (None where none are held out), and the updates made."""

    params: Any
    acceptance: Acceptance | None
    steps: int


class Trainer:
    """Trains one head for a fixed target."""

    def __init__(self, objective: Objective, schedule: Schedule, target: Params, ids: Int32[np.ndarray, "V"] | None,
                 directory: pathlib.Path, console: Console) -> None:
        """
        Args:
          objective, schedule: what and how.
          target: the target's parameters.
          ids: target ids of the head's vocabulary, None where it is the target's.
          directory: of checkpoints and log.jsonl.
          console: where progress is told.
        """
        self.objective, self.schedule, self._target = objective, schedule, target
        self._ids = None if ids is None else jnp.asarray(ids)
        self._directory, self._console = directory, console
        self._optimizer = schedule.optimizer()
        self._update = jax.jit(self._update_step, donate_argnums=0)
        self._evaluate = jax.jit(lambda *arguments: objective(*arguments)[1])

    def train(self, params: Any, sequences: Sequences, training: np.ndarray, held_out: np.ndarray) -> Trained:
        """Trains from `params`, or from the newest checkpoint, on the sequences of the first indices.

        Raises:
          UserError: checkpoints found there are of another head, or can't be written, or the training diverges.
        """
        schedule = self.schedule
        state = params, self._optimizer.init(params)
        outside = row_packing.pack(sequences, held_out, schedule.length)
        kept = Checkpoints(self._directory / "checkpoints")
        done = max(kept.steps(), default=0)
        if done:
            state = kept.restore(done, state)
            self._console.print(f"training: going on behind update {done}" if done < schedule.steps else
                                f"training: finished before, after update {done}", highlight=False)
        self._mend_log(done)
        batches, start, told = self._batches(sequences, training, done), time.perf_counter(), done
        sums = None
        for step in range(done + 1, schedule.steps + 1):
            state, figures = self._update(state, self._target, self._ids, next(batches))
            sums = figures if sums is None else jax.tree.map(jnp.add, sums, figures)
            if step % 50 == 0 or step == schedule.steps:
                sums = jax.device_get(sums)
                self._tell(step, sums, step - told, time.perf_counter() - start)
                sums, told, start = None, step, time.perf_counter()
            if step % schedule.evaluate_every == 0 and step < schedule.steps:
                self._held_out(step, state[0], outside)
                start = time.perf_counter()
            if step % schedule.save_every == 0 or step == schedule.steps:
                kept.save(step, state)
                start = time.perf_counter()
        made = max(done, schedule.steps)
        return Trained(params=state[0], acceptance=self._held_out(made, state[0], outside), steps=made)

    def _update_step(self, state: tuple[Any, Any], target: Params, ids: Array | None, batch: dict[str, Array]
                     ) -> tuple[tuple[Any, Any], dict[str, Array]]:
        params, moments = state
        (_, figures), gradient = jax.value_and_grad(self.objective, has_aux=True)(params, target, ids, batch)
        updates, moments = self._optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), figures

    def _batches(self, sequences: Sequences, training: np.ndarray, done: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches of one epoch after another, each newly shuffled and packed, from update `done` on."""
        number = 0
        for epoch in range(2**31):
            order = np.random.default_rng([self.schedule.seed, epoch]).permutation(training)
            packed = row_packing.pack(sequences, order, self.schedule.length)
            if len(packed) < self.schedule.batch:
                raise UserError(f"the answers fill {count(len(packed), 'row')} of {self.schedule.length} tokens, a batch needs "
                                f"{self.schedule.batch}; give more prompts, or a smaller --batch")
            for first in range(0, len(packed) - self.schedule.batch + 1, self.schedule.batch):
                number += 1
                if number > done:
                    yield packed[first:first + self.schedule.batch].arrays

    def _held_out(self, step: int, params: Any, outside: Rows) -> Acceptance | None:
        if not len(outside):
            return None
        counts: Float[np.ndarray, "J 4"] = np.zeros((self.objective.steps, 4))
        for first in range(0, len(outside), self.schedule.batch):
            batch = outside[first:first + self.schedule.batch].arrays
            missing = self.schedule.batch - len(batch["tokens"])
            batch = {key: np.pad(value, ((0, missing), (0, 0))) for key, value in batch.items()}
            counts += np.asarray(self._evaluate(params, self._target, self._ids, batch)["counts"])
        found = Acceptance.of(counts)
        self._note(f"held out after {count(step, 'update')}: chain accept length {found.accept_length:.3f}, hit rates "
                   f"{' '.join(f'{rate:.3f}' for rate in found.hit_rates)}",
                   step=step, held_out_accept_length=found.accept_length, held_out_hit_rates=found.hit_rates)
        return found

    def _tell(self, step: int, sums: dict[str, Array], updates: int, seconds: float) -> None:
        found, loss = Acceptance.of(sums["counts"]), float(sums["loss"]) / updates
        if not math.isfinite(loss):
            raise UserError(f"training has diverged by update {step}: its loss is not finite; lower --learning_rate and train "
                            "again with another --work_dir")
        speed = updates * self.schedule.batch * self.schedule.length / seconds
        self._note(f"update {step} of {self.schedule.steps}: loss {loss:.3f}, chain accept length "
                   f"{found.accept_length:.3f}, first hit rate {found.hit_rates[0]:.3f}, {speed:.0f} tokens/s",
                   step=step, loss=loss, accept_length=found.accept_length, hit_rates=found.hit_rates,
                   tokens_per_second=speed)

    def _note(self, text: str, **figures: Any) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
        try:
            with (self._directory / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0][:160]
            raise UserError(f"{self._directory} can't be written: {reason}; the checkpoints it holds are kept, and the same "
                            "command goes on behind them") from None

    def _mend_log(self, done: int) -> None:
        """Drops what the log says of updates that are made again, and the half line that a full disk may have left."""
        log = self._directory / "log.jsonl"
        if not log.exists():
            return
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = "".join(line for line in lines if (step := _logged_step(line)) is not None and step <= done)
        put_text(log, kept, advice="the checkpoints there are kept, and the same command goes on behind them")


def _logged_step(line: str) -> int | None:
    """The update that a whole line of the log is about; None for any other line."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
