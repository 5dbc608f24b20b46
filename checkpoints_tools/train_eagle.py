"""Trains an EAGLE head for a model: python -m checkpoints_tools.train_eagle MODEL DST --prompts=FILE [--version=3]

The target answers the prompts itself; the head learns to draft these answers. MODEL is anything that checkpoints_tools.convert
reads, or a native checkpoint; FILE has one JSON object a line, {"turns": [text, ...]} or {"prompt": text}. DST gets the head in
the official layout (config.json, model.safetensors), which `specmq_jax.load_head` and the official implementation load. Answers
and checkpoints stay in --work_dir, and the same command goes on where a killed one stopped, with the same settings alone. More
--epochs are an extension, which --extend asks for: from the update at which it goes on, the learning rate follows the schedule
of the longer training.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Int32
from rich.console import Console

from checkpoints_tools.arguments import arguments
from specmq_jax import locks
from specmq_jax import tokenizer as tk
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import check_destination
from specmq_jax.formats import DenseFormat
from specmq_jax.json_files import read_json
from specmq_jax.loading.contents import checkpoint_digest, json_digest
from specmq_jax.loading.model import Model, load
from specmq_jax.words import count

if TYPE_CHECKING:
    from checkpoints_tools.training.answers import AnswerStore
    from checkpoints_tools.training.record import TrainingRecord

USAGE = "python -m checkpoints_tools.train_eagle MODEL DST --prompts=FILE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the flags of the same names say."""

    prompts: pathlib.Path | None
    self_prompts: int = 0
    work_dir: pathlib.Path
    answers: pathlib.Path
    version: int = 3
    precision: str | None = None
    slots: int | None
    max_new_tokens: int = 512
    length: int
    batch: int
    epochs: float = 4.0
    learning_rate: float = 1e-3
    drafts: int
    draft_vocabulary: int | None = None
    held_out: float = 0.02
    seed: int = 0
    extend: bool = False


def train(source: str, destination: pathlib.Path, settings: Settings, console: Console) -> None:
    """Makes the answers, trains the head and exports it.

    Raises:
      UserError: a destination that is taken, a bad prompt file, a full disk (what was made is kept).
    """
    try:
        import optax  # noqa: F401
    except ImportError:
        raise UserError("training needs Optax: pip install 'specmq-jax[train]'") from None
    from checkpoints_tools.training import answers
    from checkpoints_tools.training.record import TrainingRecord

    record = TrainingRecord(settings.work_dir)
    _check_destination(destination, record)
    dialogues = answers.read_prompts(settings.prompts) if settings.prompts else []
    target = load(source, precision=settings.precision)
    _check(target, settings)
    content = checkpoint_digest(target.directory)
    with _claimed(settings.work_dir):
        record = TrainingRecord(settings.work_dir)
        record.begin(_identity(settings, content, target, dialogues), extend=settings.extend)
        updates = _train(destination, settings, console, target, content, dialogues)
        record.finish(updates)


def _train(destination: pathlib.Path, settings: Settings, console: Console, target: Model, content: str,
           dialogues: list[tuple[str, ...]]) -> int:
    """Makes the head of a training that is on record, and returns its updates."""
    from checkpoints_tools.training import answers, head_files, rows
    from checkpoints_tools.training.objective import Objective
    from checkpoints_tools.training.trainer import Schedule, Trainer

    dense = target.dense()
    sequences = answers.sequences(_answered(settings, console, target, dense, content, dialogues))
    if not sequences.tokens:
        raise UserError(f"no prompt was answered, so that there is nothing to train on; give shorter ones, or a --length above "
                        f"{settings.length}")
    inside, outside = rows.split(sequences, held_out=settings.held_out, seed=settings.seed)
    ids = _draft_ids(sequences, inside, target, settings)
    official = head_files.official_config(settings.version, target.config, read_json(target.directory / "config.json"),
                                          target.config.vocab_size if ids is None else len(ids))
    config = head_files.new_config(official, target.config)
    tokens = sum(len(sequences.tokens[index]) for index in inside)
    updates = max(1, round(settings.epochs * tokens / (settings.batch * settings.length)))
    console.print(f"training: {count(len(inside), 'answer')} of {tokens} tokens with the prompts, {len(outside)} held out; "
                  f"{count(updates, 'update')} of {settings.batch} x {settings.length} tokens", highlight=False, soft_wrap=True)
    objective = Objective.of(dense, config, steps=settings.drafts, precision=_precision())
    schedule = Schedule(steps=updates, batch=settings.batch, length=settings.length, learning_rate=settings.learning_rate,
                        seed=settings.seed)
    trainer = Trainer(objective, schedule, dense.params, ids, settings.work_dir, console)
    start = head_files.initial_parameters(config, dense.params, ids, jax.random.key(settings.seed))
    trained = trainer.train(start, sequences, inside, outside)
    head_files.export(destination, jax.device_get(trained.params), config, official, ids)
    return trained.steps


def _answered(settings: Settings, console: Console, target: Model, dense: Model, content: str,
              dialogues: list[tuple[str, ...]]) -> "AnswerStore":
    """The target's answers, as far as they are missing made."""
    from checkpoints_tools.training import answers
    from checkpoints_tools.training.sampler import Sampler

    tokenizer = tk.load_tokenizer(target.directory)
    sampler = Sampler(module=dense.module, slots=settings.slots or _slots(target, settings.length), max_len=settings.length,
                      max_new_tokens=settings.max_new_tokens, stop_tokens=tk.stop_tokens(tokenizer, target.directory))
    made = answers.settings(content, target.precision, sampler)
    with answers.claimed(settings.answers):
        answers.check_kept(settings.answers, made)
        if settings.self_prompts:
            asked = json_digest([made, settings.self_prompts, settings.seed])
            dialogues = dialogues + answers.own_prompts(settings.answers / f"own_prompts_{asked}.jsonl", sampler, dense.params,
                                                        tokenizer, settings.self_prompts, settings.seed, console)
        store = answers.AnswerStore(settings.answers, made | {"prompts": json_digest(dialogues)})
        answers.make(store, sampler, dense.params, tokenizer, dialogues, console)
    return store


def _identity(settings: Settings, content: str, target: Model, dialogues: list[tuple[str, ...]]) -> dict[str, Any]:
    """What decides the head, JSON values."""
    own = ("self_prompts", "version", "max_new_tokens", "length", "batch", "epochs", "learning_rate", "drafts",
           "draft_vocabulary", "held_out", "seed")
    return {"model content": content, "precision": target.precision, "prompts": json_digest(dialogues),
            **{name: getattr(settings, name) for name in own}, "arithmetic": _precision().dtype.name}


def _precision() -> DenseFormat:
    """That a head is trained in."""
    return DenseFormat(kind="fp32" if jax.default_backend() == "cpu" else "bf16")


def _check_destination(destination: pathlib.Path, record: "TrainingRecord") -> None:
    try:
        check_destination(destination)
    except UserError as error:
        if record.finished is None:
            raise
        raise UserError(f"{error}; the training in {record.directory} has finished, after {count(record.finished, 'update')}; "
                        f"another name with --work_dir={record.directory}, --extend and more --epochs trains it on") from None


def _claimed(work_dir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other trainings out of the directory; errors as in `locks.claimed`."""
    return locks.claimed(work_dir, ".run.lock", "another training is going on", "give another --work_dir")


def _check(target: Model, settings: Settings) -> None:
    """What the flags ask for is possible with this target."""
    for name in ("epochs", "learning_rate"):
        if not math.isfinite(getattr(settings, name)):
            raise UserError(f"--{name}={getattr(settings, name)} is no number to train with; give a finite one")
    config = target.config
    config.require("training a head")
    if settings.version == 3 and config.num_layers < 4:
        raise UserError(f"an EAGLE-3 head reads three layers of a target of at least 4; this one has {config.num_layers}; "
                        "train --version=2")
    if settings.length > config.max_position:
        raise UserError(f"--length={settings.length} exceeds the model's limit of {config.max_position} tokens")


def _slots(target: Model, length: int) -> int:
    """As many dialogues side by side as a third of the free memory holds caches for, 512 at most; 8 on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
        return 8
    config = target.config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * target.module.format.dtype.itemsize
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return max(8, min(512, free // 3 // (row * length)))


def _draft_ids(sequences: Any, inside: np.ndarray, target: Model, settings: Settings) -> Int32[np.ndarray, "V"] | None:
    """The most frequent tokens of the answers, ascending; None where the head scores the target's whole vocabulary."""
    size = settings.draft_vocabulary or min(32768, target.config.vocab_size)
    if settings.version == 2 or size >= target.config.vocab_size:
        return None
    from specmq_jax.decoding.drafters.vocabulary import rank

    answered = (sequences.tokens[index][sequences.prompts[index]:].tolist() for index in inside)
    return np.sort(rank(answered, target.config.vocab_size)[:size]).astype(np.int32)


def main(argv: Sequence[str]) -> None:
    source, destination = arguments(argv, USAGE, 2)
    values = flags.FLAGS
    if not values.prompts and not values.self_prompts:
        raise UserError(f"--prompts=FILE or --self_prompts=N is missing; usage: {USAGE}")
    cpu = jax.default_backend() == "cpu"
    work_dir = pathlib.Path(values.work_dir or f"{destination}.work")
    settings = Settings(
        prompts=pathlib.Path(values.prompts) if values.prompts else None, self_prompts=values.self_prompts,
        work_dir=work_dir, answers=pathlib.Path(values.answers or work_dir / "answers"), version=int(values.version),
        precision=values.precision, slots=values.slots, max_new_tokens=values.max_new_tokens,
        length=values.length, batch=values.batch or (4 if cpu else 16), epochs=values.epochs,
        learning_rate=values.learning_rate, drafts=values.drafts or (3 if values.version == "2" else 5),
        draft_vocabulary=values.draft_vocabulary, held_out=values.held_out, seed=values.seed,
        extend=values.extend)
    train(source, pathlib.Path(destination), settings, Console(stderr=True))
    print(destination)


if __name__ == "__main__":
    flags.DEFINE_string("prompts", None, "What users say: JSON lines with \"turns\", a list of texts, or \"prompt\", one.")
    flags.DEFINE_integer("self_prompts", 0, "Prompts that the target writes itself, beside those of --prompts.", lower_bound=0)
    flags.DEFINE_enum("version", "3", ["2", "3"], "2 trains an EAGLE-2 head, 3 an EAGLE-3 head.")
    flags.DEFINE_string("precision", None, "Weight format of the target, made by round-to-nearest. Default: as stored.")
    flags.DEFINE_string("work_dir", None, "Where checkpoints and log.jsonl go. Default: DST.work.")
    flags.DEFINE_string("answers", None, "Where the target's answers are kept; heads of one target may share it. Default: "
                        "answers in --work_dir.")
    flags.DEFINE_integer("slots", None, "Dialogues answered side by side. Default: 8 on a CPU, on a GPU what fits, 512 at "
                         "most.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 512, "Tokens of an answer at most.", lower_bound=2)
    flags.DEFINE_integer("length", 1024, "Tokens of a prompt with its answer, and of a row of training.", lower_bound=64)
    flags.DEFINE_integer("batch", None, "Rows of an update. Default: 4 on a CPU, 16 on a GPU.", lower_bound=1)
    flags.DEFINE_float("epochs", 4.0, "How often each answer is trained on.", lower_bound=0)
    flags.DEFINE_boolean("extend", False, "Train a training in --work_dir on to more --epochs than it was begun with.")
    flags.DEFINE_float("learning_rate", 1e-3, "At its peak.", lower_bound=0)
    flags.DEFINE_integer("drafts", None, "Successive drafts that training unrolls. Default: 3 for version 2, 5 for 3.",
                         lower_bound=1)
    flags.DEFINE_integer("draft_vocabulary", None, "Tokens that an EAGLE-3 head scores, the most frequent of the answers. "
                         "Default: 32768, at most the target's.", lower_bound=1)
    flags.DEFINE_float("held_out", 0.02, "Share of the dialogues that acceptance is measured on; above 0 at least one "
                       "of several, 0 none.", 0, 0.5)
    flags.DEFINE_integer("seed", 0, "Of the head's first parameters, the split and the order of training.", 0, 2**32 - 1)
    entry.run(main)
