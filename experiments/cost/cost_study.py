"""Measures what the cost model needs of a target and of what drafts for it, and predicts every setting."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import specmq_jax as sm
from experiments.answers import metrics
from experiments.cost import cost_search
from experiments.cost.acceptance import agreement, text_ranks
from experiments.cost.cost_search import Prediction, SmallRanks
from experiments.cost.observation import Forced, Watch, Watched, greedy_choices
from experiments.running.methods import Choice, Workbench
from specmq_jax.decoding.costs.stopwatch import Ladder, Say, Stopwatch
from specmq_jax.decoding.costs.table import Costs, Curve
from specmq_jax.errors import UserError
from specmq_jax.words import count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which settings are looked at, and where times are measured.

    Attributes:
      ladder: of the measurements; its last rungs bound tree sizes, depths and the lengths of chains.
      min_draft_length: the hierarchy's, at most.
    """

    ladder: Ladder
    min_draft_length: int

    @property
    def sizes(self) -> range:
        return range(2, self.ladder.rows[-1] + 1)

    @property
    def depths(self) -> range:
        return range(1, self.ladder.depths[-1] + 1)

    @property
    def lengths(self) -> range:
        return range(1, self.ladder.lengths[-1] + 1)

    def check(self) -> None:
        """A chain with more nodes than T_v(n) is measured for is a `UserError`."""
        longest = max(self.ladder.lengths[-1], self.min_draft_length + self.ladder.depths[-1]) + 1
        if longest > self.ladder.rows[-1]:
            raise UserError(f"drafts of up to {longest} nodes are looked at, and verification is timed for "
                            f"{self.ladder.rows[-1]} at most; raise --most_nodes, or lower --most_depth or --most_draft_tokens")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """What a study found.

    Attributes:
      predictions: of every setting, plain decoding first.
      verify: T_v(n) by precision.
      answers, tokens: how many answers, and tokens of them, acceptance was seen on.
    """

    predictions: tuple[Prediction, ...]
    verify: Mapping[str, Curve]
    answers: int
    tokens: int

    def best(self, method: str | None = None) -> Prediction:
        """The fastest setting, of one method or of all."""
        return max((p for p in self.predictions if method in (None, p.choice.method)), key=lambda p: p.speedup)

    def tokens_per_second(self, prediction: Prediction) -> float | None:
        """Of answers as long as those seen; the first token of each needs no round. None where no answer has a second one."""
        rounds = (self.tokens - self.answers) / prediction.accept_length
        return metrics.speed([self.tokens], [rounds * prediction.seconds])

    @property
    def methods(self) -> tuple[str, ...]:
        """Of the predictions."""
        return tuple(dict.fromkeys(prediction.choice.method for prediction in self.predictions))


class Study:
    """One target, its drafters, and prompts whose answers acceptance is seen on."""

    def __init__(self, bench: Workbench, bounds: Bounds, prompts: Sequence[Sequence[int]], max_new_tokens: int, say: Say
                 ) -> None:
        """`say` is told what goes on.

        Raises:
          UserError: answers of a single token, or a prompt that leaves no room for an answer in the cache.
        """
        bounds.check()
        if max_new_tokens < 2:
            raise UserError(f"acceptance is seen behind an answer's first token; found --max_new_tokens={max_new_tokens}, give "
                            "at least 2")
        longest = max(map(len, prompts))
        if longest + max_new_tokens > bench.max_length:
            raise UserError(f"the cost model answers prompts of up to {count(longest, 'token')} with {max_new_tokens}, and the "
                            f"cache holds {bench.max_length}; raise --max_length or lower --max_new_tokens")
        self._bench, self._bounds, self._prompts, self._say = bench, bounds, prompts, say
        self._places = max_new_tokens - 1
        self._answers: list[Watched] = []
        self._timing = dataclasses.replace(bench.config, stop_tokens=())

    def run(self, methods: Sequence[str], precisions: Sequence[str] = ()) -> Findings:
        """Predicts the methods' settings; T_v(n) is measured for more precisions of the target, too.

        Raises:
          UserError: what a method drafts with can't be loaded, or an unknown precision.
        """
        drafters = {method: self._bench.drafter(method, self._reference(method)) for method in methods if method != "baseline"}
        eagle = {method: drafter for method, drafter in drafters.items() if isinstance(drafter, sm.EagleDrafter)}
        ranks = {method: self._eagle_ranks(method, drafter) for method, drafter in eagle.items()}
        if not self._answers:
            self._answers = self._watched(self._bench.target, None)
        watch = self._stopwatch(self._bench.target)
        plain = watch.plain(self._bench.precision)
        verify, found = {self._bench.precision: plain.verify}, [cost_search.plain(plain)]
        for method, drafter in eagle.items():
            found += cost_search.trees(method, watch.drafting(method, drafter, plain), ranks[method], drafter.tree.top_k,
                                       self._bounds.sizes, self._bounds.depths)
        if "spec" in drafters:
            agreements = [self._agreement(drafters["spec"].model, answer) for answer in self._answers]
            found += cost_search.chains(watch.drafting("spec", drafters["spec"], plain), agreements, self._bounds.lengths)
        if "hier" in drafters:
            seen = self._small_ranks(drafters["hier"])
            costs = watch.drafting("hier", drafters["hier"], plain)
            found += self._hierarchies(drafters["hier"], seen, costs)
            verify.setdefault(f"small model, {self._bench.small_model.precision}", costs.small_verify)
        for precision in precisions:
            if precision not in verify:
                model = self._bench.target.with_precision(precision)
                verify[precision] = self._stopwatch(model).verify(precision)
        return Findings(predictions=tuple(found), verify=verify, answers=len(self._answers),
                        tokens=sum(len(answer.tokens) for answer in self._answers))

    def _stopwatch(self, model: sm.Model) -> Stopwatch:
        """Behind as many tokens as the answers have in the middle."""
        live = round(np.mean([len(answer.prompt) + len(answer.tokens) / 2 for answer in self._answers]))
        text = [token for answer in self._answers for token in (*answer.prompt, *answer.tokens.tolist())]
        prompt = tuple((text * math.ceil(live / len(text)))[:live])
        return Stopwatch(model=model, config=self._timing, prompt=prompt, ladder=self._bounds.ladder, say=self._say)

    def _watched(self, model: sm.Model, head: sm.EagleDrafter | None) -> list[Watched]:
        watch = Watch(model, self._bench.config, head, self._places)
        return [watch.answer(prompt) for prompt in self._prompts]

    def _reference(self, method: str) -> Choice:
        """The setting whose whole rounds are timed: that of the models, within the bounds."""
        models, ladder = self._bench.models, self._bounds.ladder
        tree = sm.TreeConfig.fitting(min(models.tree.depth, ladder.depths[-1]), models.tree.top_k,
                                     min(models.tree.size, ladder.rows[-1]))
        return Choice(
            method=method, tree=tree, draft_length=min(models.draft_length, ladder.lengths[-1]),
            min_draft_length=min(models.min_draft_length, self._bounds.min_draft_length))

    def _deepest(self, drafter: sm.EagleDrafter) -> sm.EagleDrafter:
        """What is watched; the size of its trees doesn't matter."""
        tree = dataclasses.replace(drafter.tree, depth=self._bounds.ladder.depths[-1], size=2)
        return dataclasses.replace(drafter, tree=tree)

    def _eagle_ranks(self, method: str, drafter: sm.EagleDrafter) -> list[cost_search.Ranks]:
        self._say(f"{method}: watching its head along {count(len(self._prompts), 'answer')}")
        answers = self._watched(self._bench.target, self._deepest(drafter))
        self._answers = self._answers or answers
        return [text_ranks(answer.seen, answer.tokens) for answer in answers if len(answer.tokens) > 1]

    @staticmethod
    def _agreement(small_model: sm.Model, answer: Watched) -> np.ndarray:
        return agreement(greedy_choices(small_model, answer.prompt, answer.tokens), answer.tokens)

    def _hierarchies(self, drafter: sm.HierarchicalDrafter, seen: Sequence[SmallRanks], costs: Costs) -> Iterator[Prediction]:
        sizes = [rows for rows in self._bounds.ladder.rows if rows > 1]
        lengths = range(1, self._bounds.min_draft_length + 1)
        return cost_search.hierarchies(costs, seen, drafter.inner.tree.top_k, sizes, self._bounds.depths, lengths,
                                       always_ahead=drafter.draft_model_start)

    def _small_ranks(self, drafter: sm.HierarchicalDrafter) -> list[SmallRanks]:
        """The small model's head along the target's answers, and along the small model's own text wherever that leaves them."""
        self._say(f"hier: watching the small model's head along {count(len(self._answers), 'answer')}")
        model, inner = drafter.model, self._deepest(drafter.inner)
        along = Watch(model, dataclasses.replace(self._timing, sampling=Forced()), inner, self._places)
        ahead = self._bounds.min_draft_length + self._bounds.ladder.depths[-1]
        own = Watch(model, dataclasses.replace(self._timing, sampling=sm.Greedy()), inner, ahead)
        found = []
        for answer in self._answers:
            places = len(answer.tokens) - 1
            if places < 1:
                continue
            agreed = self._agreement(model, answer)
            strayed = {place: own.answer([*answer.prompt, *answer.tokens[:place + 1].tolist()])
                       for place in range(places) if not agreed[place]
                       and len(answer.prompt) + place + ahead + 2 < self._timing.max_len}
            seen = along.text(answer.prompt, answer.tokens).seen
            ranks = []
            for place in range(places):
                end = place + int(agreed[place])
                elsewhere = strayed[end].tokens if end in strayed else ()
                ranks.append(seen.ranks(place, [*answer.tokens[place + 1:end + 1], *elsewhere]))
            found.append(SmallRanks(agreement=agreed, ranks=np.stack(ranks),
                                    strayed={place: text_ranks(text.seen, text.tokens) for place, text in strayed.items()}))
        return found
