"""What draft trees of every shape would have had accepted, from one large tree at each place of a text.

Host arithmetic only. A place r is that behind token r of an answer: the drafter has just seen that token, and what it drafts is
compared with the tokens from r + 1 on.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int32

from specmq_jax.decoding.config import TreeConfig

_NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """Candidates at R places, in order of drafting: `top_k` of the first level, top_k^2 of each further one.

    Attributes:
      top_k: of the trees.
      scores: f32[R, C]; tokens: i32[R, C]; parents: i32[R, C], -1 for the root.
    """

    top_k: int
    scores: Float[np.ndarray, "R C"]
    tokens: Int32[np.ndarray, "R C"]
    parents: Int32[np.ndarray, "R C"]

    @property
    def depth(self) -> int:
        """Levels of the trees."""
        return 1 + (self.scores.shape[1] - self.top_k) // self.top_k**2

    def level_end(self, depth: int) -> int:
        """How many candidates the first `depth` levels have."""
        return TreeConfig.fitting(depth, self.top_k).candidates

    def ranks(self, place: int, following: Sequence[int]) -> Int32[np.ndarray, "D D"]:
        """Ranks of the candidates that agree with the text behind a place.

        Args:
          place: whose candidates.
          following: the tokens that came there.

        Returns:
          i32[D, D]: at [j - 1, d - 1] how many candidates of a tree of depth d go before the one that is the j-th following
          token, behind those of the tokens before; a tree of more nodes behind its root holds it. The largest integer where
          there is none, or where j exceeds d.
        """
        result = np.full((self.depth, self.depth), _NEVER, np.int32)
        scores, tokens, parents = self.scores[place], self.tokens[place], self.parents[place]
        above = -1
        for j, token in enumerate(following[:self.depth]):
            found = np.flatnonzero((parents == above) & (tokens == token))
            if not len(found):
                break
            above = int(found[0])
            before = (scores > scores[above]) | ((scores == scores[above]) & (np.arange(len(scores)) < above))
            counts = np.cumsum(before)
            for depth in range(j + 1, self.depth + 1):
                result[j, depth - 1] = counts[self.level_end(depth) - 1]
        return result


def text_ranks(seen: Seen, tokens: Sequence[int]) -> Int32[np.ndarray, "R D D"]:
    """`Seen.ranks` of every place of an answer of R + 1 tokens."""
    places = range(len(tokens) - 1)
    return np.stack([seen.ranks(place, tokens[place + 1:]) for place in places]) if places else np.zeros(
        (0, seen.depth, seen.depth), np.int32)


def tree_lengths(ranks: Int32[np.ndarray, "... D D"], depth: int, size: int) -> Int32[np.ndarray, "..."]:
    """Accept lengths, the bonus token counted, of trees of `size` nodes with the root; ranks as in `Seen.ranks`."""
    return 1 + (ranks[..., depth - 1] < size - 1).sum(-1)


def agreement(choices: Int32[np.ndarray, "R"], tokens: Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "R"]:
    """How many tokens from each place on a model would have drafted rightly; `choices` are its best behind each token but the
    last."""
    runs, run = np.zeros(len(choices), np.int32), 0
    for place in reversed(range(len(choices))):
        run = run + 1 if choices[place] == tokens[place + 1] else 0
        runs[place] = run
    return runs


def count_rounds(lengths: Sequence[int]) -> int:
    """Rounds that an answer takes whose round at place r has accept length `lengths[r]`."""
    place = rounds = 0
    while place < len(lengths):
        place += int(lengths[place])
        rounds += 1
    return rounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """What making `tokens` tokens behind the first took.

    Attributes:
      rounds: of the target.
      inner_rounds, drafted: of a hierarchy's small model: its rounds, and the tokens that they drafted.
      ahead: its passes that go a token ahead.
    """

    tokens: int = 0
    rounds: int = 0
    inner_rounds: int = 0
    drafted: int = 0
    ahead: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(**{field.name: getattr(self, field.name) + getattr(other, field.name)
                        for field in dataclasses.fields(self)})

    @property
    def accept_length(self) -> float:
        """tau: tokens a round."""
        return self.tokens / self.rounds if self.rounds else 1.0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SmallModel:
    """What the hierarchy's small model does at the places of an answer, for one shape of its own tree.

    Attributes:
      agreement: i32[R], of its greedy tokens with the answer.
      lengths: i32[R], its accept length at each place, against its own tokens.
      strayed: where it disagrees, accept lengths at the token it drafts there instead, at the one behind that, and so on.
    """

    agreement: Int32[np.ndarray, "R"]
    lengths: Int32[np.ndarray, "R"]
    strayed: Mapping[int, Int32[np.ndarray, "S"]]

    def count(self, min_draft_length: int, *, always_ahead: bool = False) -> Count:
        """Follows the rounds of `specmq_jax.HierarchicalDrafter` through the answer; `always_ahead` is its
        draft_model_start."""
        place, ahead, total = 0, False, Count(tokens=len(self.agreement))
        while place < len(self.agreement):
            agreed, start, inner = int(self.agreement[place]), int(ahead), 0
            drafted = start
            while drafted < min_draft_length:
                drafted += self._inner_length(place, drafted, agreed)
                inner += 1
            accepted = min(agreed, drafted) + 1
            ahead = accepted > drafted or always_ahead
            place += accepted
            total += Count(rounds=1, inner_rounds=inner, drafted=drafted - start, ahead=int(ahead))
        return total

    def _inner_length(self, place: int, drafted: int, agreed: int) -> int:
        if drafted > agreed:
            lengths = self.strayed.get(place + agreed)
            if lengths is not None and drafted - agreed - 1 < len(lengths):
                return int(lengths[drafted - agreed - 1])
        elif place + drafted < len(self.lengths):
            return int(self.lengths[place + drafted])
        return self._typical  # behind the answer's end nothing was seen

    @property
    def _typical(self) -> int:
        return max(1, round(float(self.lengths.mean()))) if len(self.lengths) else 1

