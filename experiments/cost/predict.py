"""What the cost model predicts of the methods that settings name."""

from collections.abc import Sequence

import jax

import specmq_jax as sm
from experiments.answers import metrics
from experiments.cost.cost_study import Bounds, Findings, Study
from experiments.running import methods
from experiments.running.methods import Choice, Workbench
from experiments.running.settings import Settings
from specmq_jax.decoding.costs.stopwatch import Ladder, Say

# kernels take rows in tiles of 8, 16 and 32, behind the end of each of which the time leaps
CPU_ROWS, GPU_ROWS = (1, 2, 3, 4, 6, 8, 12), (1, 2, 4, 8, 9, 16, 17, 24, 32, 33, 48, 60, 64)


def bounds(*, nodes: int | None = None, depth: int | None = None, draft_tokens: int | None = None, runs: int = 10) -> Bounds:
    """What suits the device where nothing is given.

    Args:
      nodes: of a tree at most, the root counted.
      depth: of a tree at most.
      draft_tokens: of a small model's drafts at most, or in the hierarchy before the last inner round.
      runs: of each timed loop.
    """
    cpu = jax.default_backend() == "cpu"
    depth, draft_tokens = depth or (5 if cpu else 8), draft_tokens or (5 if cpu else 10)
    rows = CPU_ROWS if cpu else GPU_ROWS
    if nodes:
        rows = (*(n for n in rows if n < nodes), nodes)
    ladder = Ladder(rows=rows, depths=_rungs(depth), lengths=_rungs(draft_tokens), runs=runs)
    return Bounds(ladder=ladder, min_draft_length=draft_tokens)


def _rungs(most: int) -> tuple[int, ...]:
    return tuple(sorted({1, (most + 1) // 2, most}))


def study(settings: Settings, bench: Workbench, limits: Bounds, say: Say, precisions: Sequence[str] = ()) -> Findings:
    """Measures and predicts the methods that the settings name.

    Raises:
      UserError: as in `Study`.
    """
    prompts = [bench.encode(question.messages([])) for question in settings.questions()]
    wanted = [method for method in settings.methods if method != methods.AUTO]
    return Study(bench, limits, prompts, settings.max_new_tokens, say).run(wanted, precisions)


def measured(settings: Settings, bench: Workbench, choices: Sequence[Choice]) -> dict[str, float | None]:
    """Tokens/s that each method's setting really makes on the first turns, by method; as `metrics` defines them.

    The settings take turns at each question, so that a device that grows slower or faster does so for all.
    """
    prompts = [bench.encode(question.messages([])) for question in settings.questions()]
    decoders = {choice.method: sm.Decoder(bench.target, bench.drafter(choice.method, choice), bench.config)
                for choice in choices}
    for decoder in decoders.values():
        for prompt in prompts:
            decoder.generate(prompt, 2)  # compiles
    speeds: dict[str, list[float | None]] = {method: [] for method in decoders}
    for prompt in prompts:
        for method, decoder in decoders.items():
            generation = decoder.generate(prompt, settings.max_new_tokens)
            speeds[method].append(metrics.speed([len(generation.tokens)], [generation.seconds]))
    return {method: metrics.mean_speed(found) for method, found in speeds.items()}


def describe(choice: Choice) -> str:
    """The flags that ask for a setting."""
    tree = choice.tree
    trees = f"--tree_depth={tree.depth} --tree_top_k={tree.top_k} --tree_size={tree.size}"
    match choice.method:
        case "baseline":
            return "--method=baseline"
        case "spec":
            return f"--method=spec --draft_length={choice.draft_length}"
        case "hier":
            return f"--method=hier {trees} --min_draft_length={choice.min_draft_length}"
    return f"--method={choice.method} {trees}"
