"""Sequences packed into rows of one length for training."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from checkpoints_tools.training.answers import Sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """N rows of S tokens, each holding whole sequences one behind another.

    Attributes:
      tokens: ids; 0 where there is none.
      segments: which sequence of its row a token belongs to, from 1 on; 0 where there is none.
      positions: of each token in its sequence.
      answer: the token is the target's own and not the prompt's.
    """

    tokens: Int32[np.ndarray, "N S"]
    segments: Int32[np.ndarray, "N S"]
    positions: Int32[np.ndarray, "N S"]
    answer: Bool[np.ndarray, "N S"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Int32[np.ndarray, "n"]) -> "Rows":
        return Rows(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def split(sequences: Sequences, *, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the sequences to train on and of those held out; all turns of a dialogue fall on one side.

    A share above 0 holds out one dialogue at least, but never the only one.
    """
    dialogues = np.unique(sequences.dialogues)
    count = min(max(1, round(held_out * len(dialogues))), len(dialogues) - 1) if held_out > 0 and len(dialogues) else 0
    chosen = np.random.default_rng(seed).permutation(dialogues)[:count]
    outside = np.isin(sequences.dialogues, chosen)
    return np.flatnonzero(~outside), np.flatnonzero(outside)


def pack(sequences: Sequences, order: np.ndarray, length: int) -> Rows:
    """Rows of `length` tokens from the sequences of these indices, in this order; longer ones are cut."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # rows with room: tokens used and number
    for index in order:
        size = min(len(sequences.tokens[index]), length)
        fit = next((i for i, (used, _) in enumerate(open_rows) if used + size <= length), None)
        if fit is None:
            rows.append([index])
            open_rows.append((size, len(rows) - 1))
        else:
            used, number = open_rows.pop(fit)
            rows[number].append(index)
            open_rows.append((used + size, number))
        open_rows = open_rows[-_OPEN:]
    shape = len(rows), length
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    answer = np.zeros(shape, bool)
    for number, held in enumerate(rows):
        start = 0
        for segment, index in enumerate(held, start=1):
            ids = sequences.tokens[index][:length]
            part = slice(start, start + len(ids))
            tokens[number, part], segments[number, part], positions[number, part] = ids, segment, np.arange(len(ids))
            answer[number, start + sequences.prompts[index]:part.stop] = True
            start = part.stop
    return Rows(tokens=tokens, segments=segments, positions=positions, answer=answer)


_OPEN = 16
"""Rows that packing keeps open at a time."""
