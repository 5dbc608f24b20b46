"""Writes the prompts whose answers, given by the demo model itself, train its draft heads:

python -m checkpoints_tools.demo_prompts OUT.jsonl [--gsm8k=FILE] [--count=40000] [--seed=0]

Every line is {"source": "gsm8k" | "code" | "chat", "turns": [what the user says, what the user says next, ...]}. FILE is the
train split of GSM8K, as parquet or JSON lines with a `question`. "code" comes from the standard library of the running
Python, so a seed yields the same lines only under the same Python; "chat" is put together from data/chat_*.json.
"""

import dataclasses
import json
import pathlib
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from checkpoints_tools import arguments, records
from checkpoints_tools.training import library_code
from checkpoints_tools.training.library_code import LONGEST_TURN
from specmq_jax.commands import entry
from specmq_jax.errors import UserError
from specmq_jax.files import put_text

DATA = pathlib.Path(__file__).parent / "data"
GSM8K_SHARE, CODE_SHARE = 0.19, 0.2
MOST = 1_000_000  # the composed prompts don't run out below this number
SECOND_TURN, THIRD_TURN = 0.5, 0.2
SLOT = re.compile(r"\{(?P<upper>\^?)(?:(?P<low>\d+)\.\.(?P<high>\d+)(?:/(?P<step>\d+))?|(?P<list>\w+))(?:#(?P<mark>\w))?\}")
ARTICLE, VOWEL = re.compile(r"\b[Aa] $"), re.compile(r"(?!uni|use|one\b)[aeiouAEIO]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the user says in one dialogue.

    Attributes:
      source: "gsm8k", "code" or "chat".
      turns: one text a turn.
    """

    source: str
    turns: tuple[str, ...]


class Slots:
    """Fills the slots of one dialogue's templates.

    `{city}` becomes an entry of the list `city`, another one each time until the list is used up; entries may hold slots
    themselves. `{20..90/5}` becomes a number, here a multiple of 5. `{city#a}` is the same city wherever it stands in the
    dialogue, and `{^city}` starts with a capital letter. `given` has texts that are set in as they are.
    """

    def __init__(self, lists: Mapping[str, Sequence[str]], rng: random.Random, given: Mapping[str, str]):
        self._lists, self._rng = lists, rng
        self._fixed = dict(given)
        self._drawn: dict[str, set[str]] = {}

    def fill(self, template: str) -> str:
        text, end = "", 0
        for slot in SLOT.finditer(template):
            text += template[end:slot.start()]
            value = self._value(slot)
            if ARTICLE.search(text) and VOWEL.match(value):
                text = f"{text[:-1]}n "
            text, end = text + value, slot.end()
        return text + template[end:]

    def _value(self, slot: re.Match[str]) -> str:
        key = slot[0].replace("^", "").strip("{}")
        if key in self._fixed:
            value = self._fixed[key]
        else:
            value = self._number(slot) if slot["low"] else self.fill(self._entry(slot["list"]))
            if slot["mark"]:
                self._fixed[key] = value
        return value[:1].upper() + value[1:] if slot["upper"] else value

    def _number(self, slot: re.Match[str]) -> str:
        step = int(slot["step"] or 1)
        return str(self._rng.randrange(int(slot["low"]), int(slot["high"]) + 1, step))

    def _entry(self, name: str) -> str:
        drawn = self._drawn.setdefault(name, set())
        entry = self._rng.choice([entry for entry in self._lists[name] if entry not in drawn] or self._lists[name])
        drawn.add(entry)
        return entry


def _load(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def read_gsm8k(path: pathlib.Path) -> list[str]:
    """The questions of GSM8K's train split, a parquet or JSON-lines file.

    Raises:
      UserError: as in `records.read`, or a row has no text in `question`.
    """
    questions = [record.text("question").strip() for record in records.read(path)]
    if not questions:
        raise UserError(f"{path} holds no questions; expected GSM8K's train split")
    return questions


class Composer:
    """Draws prompts of each source; the same seed draws the same ones."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)
        self._lists = _load("chat_topics.json")
        self._chat = _load("chat_dialogues.json")
        self._passages = _load("chat_passages.json")
        self._framed = _load("framed_requests.json")

    def gsm8k(self, questions: Iterable[str]) -> Iterator[Prompt]:
        """Every question once, in one of the frames."""
        for question in self._shuffled(questions):
            frame = self._rng.choice(self._framed["frames"]["gsm8k"])
            yield self._prompt("gsm8k", frame, self._framed["follow_ups"]["gsm8k"], {"question": question})

    def code(self, count: int) -> Iterator[Prompt]:
        """Requests about code and documentation of the standard library, up to eight on one piece of it."""
        pieces: list[dict[str, str]] = []
        for path in self._shuffled(library_code.files()):
            if len(pieces) > 4 * count:
                break
            pieces += library_code.pieces(path)
        requests = []
        for piece in pieces:
            frames = [frame for name in sorted(piece.keys() & self._framed["frames"].keys())
                      for frame in self._rng.sample(self._framed["frames"][name], 4 if name == "stub" else 2)]
            requests += [(rank, self._rng.random(), frame, piece) for rank, frame in enumerate(self._shuffled(frames))]
        for _, _, frame, piece in sorted(requests, key=lambda request: request[:2]):
            yield self._prompt("code", frame, self._framed["follow_ups"]["text" if "text" in piece else "code"], piece)

    def chat(self) -> Iterator[Prompt]:
        """Composed dialogues without end."""
        categories = list(self._chat["categories"].values())
        weights = [category["weight"] for category in categories]
        while True:
            category, = self._rng.choices(categories, weights)
            opening, *tied = self._rng.choice(category["openings"])
            further = tied if tied and self._rng.random() < 0.6 else category["follow_ups"]
            if self._rng.random() < 0.15:
                further = self._chat["follow_ups"]
            yield self._prompt("chat", opening, further, self._passage() if "{passage}" in opening else {})

    def _passage(self) -> dict[str, str]:
        (text, questions), (other, _) = (self._passage_text(passage) for passage in self._rng.sample(self._passages, 2))
        question, second = self._rng.sample(questions, 2)
        if self._rng.random() < 0.7:
            question = question[:1].upper() + question[1:]
        return {"passage": text, "question": question, "question_second": second[:1].upper() + second[1:],
                "distractor": other}

    def _passage_text(self, passage: Mapping[str, Any]) -> tuple[str, list[str]]:
        slots = Slots(self._lists, self._rng, {})
        first, *others = passage["sentences"]
        kept = [first, *(choices for choices in others if self._rng.random() < 0.9)]
        text = " ".join(slots.fill(sentence) for sentence in map(self._rng.choice, kept) if sentence)
        return text, [slots.fill(question) for question in passage["questions"]]

    def _prompt(self, source: str, opening: str, further: Sequence[str], given: Mapping[str, str]) -> Prompt:
        slots = Slots(self._lists, self._rng, given)
        turns = [slots.fill(opening)]
        if self._rng.random() < SECOND_TURN:
            count = 1 + (self._rng.random() < THIRD_TURN)
            turns += [slots.fill(template) for template in self._rng.sample(further, min(count, len(further)))]
        if source == "chat" and len(turns[0]) < 100:
            turns[0] = self._typed(turns[0])
        return Prompt(source=source, turns=tuple(turns))

    def _typed(self, text: str) -> str:
        """`text`, at times as hurried users type it."""
        if self._rng.random() < 0.08:
            text = text.rstrip(".?")
        return text[:1].lower() + text[1:] if self._rng.random() < 0.08 else text

    def _shuffled(self, items: Iterable[Any]) -> list[Any]:
        items = list(items)
        self._rng.shuffle(items)
        return items


def compose(count: int, seed: int, questions: Sequence[str]) -> list[Prompt]:
    """`count` shuffled prompts with distinct first turns; GSM8K's and the library's are at most their shares.

    Raises:
      UserError: `count` is below 1 or above a million.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"--count={count} can't be made; choose a number from 1 to {MOST}")
    composer = Composer(seed)
    found: dict[str, Prompt] = {}

    def add(prompts: Iterable[Prompt], wanted: int) -> None:
        end = len(found) + wanted
        for prompt in prompts if wanted else ():
            if all(len(turn) <= LONGEST_TURN for turn in prompt.turns):
                found.setdefault(prompt.turns[0], prompt)
            if len(found) == end:
                break

    add(composer.gsm8k(questions), int(count * GSM8K_SHARE))
    add(composer.code(int(count * CODE_SHARE)), int(count * CODE_SHARE))
    add(composer.chat(), count - len(found))
    prompts = list(found.values())
    random.Random(seed).shuffle(prompts)
    return prompts


def write(destination: str | pathlib.Path, count: int, seed: int, gsm8k: str | pathlib.Path | None) -> pathlib.Path:
    """Writes `count` prompts to `destination`, which it returns; without `gsm8k` that source is left out."""
    destination = pathlib.Path(destination)
    if destination.exists():
        raise UserError(f"{destination} exists already; choose another name or remove it")
    if not gsm8k:
        print("notice: no --gsm8k=FILE, so no GSM8K questions are among the prompts", file=sys.stderr)
    prompts = compose(count, seed, read_gsm8k(pathlib.Path(gsm8k)) if gsm8k else [])
    lines = (json.dumps(dataclasses.asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    put_text(destination, "".join(lines))
    return destination


def main(argv: Sequence[str]) -> None:
    usage = "python -m checkpoints_tools.demo_prompts OUT.jsonl [--gsm8k=FILE] [--count=N] [--seed=N]"
    destination, = arguments.arguments(argv, usage, 1)
    print(write(destination, flags.FLAGS.count, flags.FLAGS.seed, flags.FLAGS.gsm8k))


if __name__ == "__main__":
    flags.DEFINE_string("gsm8k", None, "GSM8K's train split, parquet or JSON lines; without it this source is left out.")
    flags.DEFINE_integer("count", 40000, "How many prompts to write.")
    flags.DEFINE_integer("seed", 0, "Another seed yields other prompts.")
    entry.run(main)
