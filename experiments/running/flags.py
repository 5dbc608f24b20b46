"""The flags that all experiments share, and the settings they make."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from checkpoints_tools.readers import hub
from experiments.benchmarks.benchmark import MT_BENCH, PUBLISHED, Benchmark
from experiments.running import methods
from experiments.running.settings import Settings
from specmq_jax import formats
from specmq_jax.decoding.config import TreeConfig
from specmq_jax.decoding.sampling import Greedy, Sampling
from specmq_jax.errors import UserError
from specmq_jax.loading.head import head_version


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Defaults:
    """What suits a kind of device where a flag is left out; `methods` are those of a run whose models no flag names."""

    methods: tuple[str, ...]
    tree_depth: int
    tree_top_k: int
    tree_size: int
    min_draft_length: int
    max_new_tokens: int
    max_length: int


# a CPU pays for each row that the target verifies, a GPU hardly; and a 4-bit draft model is no faster there than its target
_CPU = _Defaults(methods=("baseline", "eagle3"), tree_depth=3, tree_top_k=2, tree_size=4, min_draft_length=3, max_new_tokens=64,
                 max_length=1024)
_GPU = _Defaults(methods=methods.NAMES, tree_depth=6, tree_top_k=10, tree_size=60, min_draft_length=6, max_new_tokens=512,
                 max_length=4096)


def _by_device(field: str) -> str:
    return f"Default: {getattr(_CPU, field)} on a CPU, {getattr(_GPU, field)} on a GPU."


_MODEL = flags.DEFINE_string(
    "model", None, "The target: a checkpoint directory, a GGUF file or a Hugging Face hub name. Default: the demo model "
    "SmolLM2-135M-Instruct, fetched on first use.")
_METHOD = flags.DEFINE_enum("method", None, list(methods.METHODS), "One method to run; instead of --methods.")
_METHODS = flags.DEFINE_list(
    "methods", None, f"Methods to run one after another, of {', '.join(methods.METHODS)}. Speedups are over baseline; auto is "
    "the method, with the tree or draft length, that the cost model predicts to be fastest, measured once. "
    f"Default for the demo model: {','.join(_CPU.methods)} on a CPU, all that fit on a GPU or beside a --drafter or --eagle. "
    "For others: baseline,spec.")
_DRAFTER = flags.DEFINE_string(
    "drafter", None, "The small model of methods spec and hier, given like --model. Default: the target's own weights "
    "at --draft_precision.")
_PRECISION = flags.DEFINE_string(
    "precision", None, "Weight format of the target, for example fp16 or w4a16, made by round-to-nearest when the model "
    "is loaded. Default: as stored.")
_DRAFT_PRECISION = flags.DEFINE_string(
    "draft_precision", None, "Weight format of the drafter. Default: as stored for a --drafter; else w4a16-g64 for the "
    "demo model and w4a16 for others.")
_DRAFT_LENGTH = flags.DEFINE_integer(
    "draft_length", 4, "Tokens that method spec drafts a round.", lower_bound=1)
_EAGLE = flags.DEFINE_list(
    "eagle", None, "Directories or hub names of EAGLE heads in the official layout, one of a version: the target's for methods "
    "eagle2 and eagle3, the small model's for hier, which takes the first. Default: the demo model's own heads.")
_TREE_DEPTH = flags.DEFINE_integer(
    "tree_depth", None, f"Levels of tokens that an EAGLE head drafts. {_by_device('tree_depth')}", lower_bound=1)
_TREE_TOP_K = flags.DEFINE_integer(
    "tree_top_k", None, f"Candidates of each node, and nodes kept of each level. {_by_device('tree_top_k')}", lower_bound=1)
_TREE_SIZE = flags.DEFINE_integer(
    "tree_size", None, f"Nodes of the tree that are verified, the root counted. {_by_device('tree_size')} Fewer where the "
    "other two flags allow no more.", lower_bound=2)
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "Ranked vocabulary from checkpoints_tools.rank_vocabulary: the head scores its most frequent tokens.")
_VOCABULARY_SIZE = flags.DEFINE_integer(
    "vocabulary_size", 32768, "Tokens of --vocabulary that the head scores.", lower_bound=1)
_MIN_DRAFT_LENGTH = flags.DEFINE_integer(
    "min_draft_length", None, "Tokens that method hier drafts at least before the target verifies. "
    f"{_by_device('min_draft_length')}", lower_bound=1)
_DRAFT_MODEL_START = flags.DEFINE_bool(
    "draft_model_start", False, "The small model of method hier drafts each round's first token by itself.")
_QUESTION_FILE = flags.DEFINE_string(
    "question_file", None, "The benchmark's questions in its own format: JSON lines, gzip or parquet; or the word "
    f"{PUBLISHED}, which downloads all of them. Default: a few of the package's own.")
_QUESTION_BEGIN = flags.DEFINE_integer("question_begin", 0, "First question, counted from 0.", lower_bound=0)
_QUESTION_END = flags.DEFINE_integer("question_end", None, "Question before which to end. Default: all.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, f"Tokens a turn at most. {_by_device('max_new_tokens')} GSM8K: 256, HumanEval: 512.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens of prompt and output that the cache holds, at most the model's own limit. An answer ends "
    f"where the cache is full. {_by_device('max_length')} GSM8K: 2048 on a CPU.", lower_bound=64)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 is greedy decoding.", lower_bound=0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many best tokens; 0 is all.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the fewest best tokens of this joint probability.", 0, 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling; any integer, of which the lowest 32 bits count.")
_REPRODUCIBLE = flags.DEFINE_bool(
    "reproducible", False, "Sum up in one order for any number of rows, so that on a GPU every method gives the baseline's "
    "answers to the letter, somewhat slower.")
_ANSWER_FILE = flags.DEFINE_string(
    "answer_file", None, "Where a single method's answers go. Default: METHOD.jsonl in --output_dir.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Where answers, summary.json and plot.png go. Default: results/EXPERIMENT-MODEL, with the names of "
    "--precision and --question_file behind it if given.")
_SLOTS = flags.DEFINE_integer(
    "slots", 1, "Questions that are answered side by side in one loop. Above 1 the answers' throughput is measured, prompts "
    "included, and no speed of a single stream.", lower_bound=1)
_RESUME = flags.DEFINE_bool(
    "resume", True, "Go on with answers found in the output directory, if made with the same settings; --noresume "
    "replaces them.")


def settings(experiment: str, *, default: Sequence[str] | None = None, offered: Sequence[str] = (),
             benchmark: Benchmark = MT_BENCH) -> Settings:
    """Reads the parsed flags.

    Args:
      experiment: begins the name of the default output directory.
      default: methods where no flag names any; None suits a comparison.
      offered: methods that may be asked for later, for which the demo model's heads are named too.
      benchmark: its sample and its lengths count where no flag gives others.

    Raises:
      UserError: an unknown method or precision, flags that contradict one another, drafts that are longer than the cache, or
        published questions that can't be downloaded.
    """
    suited = _CPU if jax.default_backend() == "cpu" else _GPU
    chosen = _methods(default or _default_methods(suited))
    if _ANSWER_FILE.value and len(chosen) > 1:
        raise UserError(f"--answer_file takes the answers of one method, and {','.join(chosen)} are to be run; give "
                        "--method=NAME, or --output_dir for several")
    for precision in filter(None, (_PRECISION.value, _DRAFT_PRECISION.value)):
        formats.get(precision)
    models = methods.Models(
        target=_MODEL.value, precision=_PRECISION.value, drafter=_DRAFTER.value, draft_length=_DRAFT_LENGTH.value,
        draft_precision=_DRAFT_PRECISION.value, eagle=_heads(), tree=_tree(suited),
        vocabulary=_VOCABULARY.value, vocabulary_size=_VOCABULARY_SIZE.value,
        min_draft_length=_MIN_DRAFT_LENGTH.value or suited.min_draft_length, draft_model_start=_DRAFT_MODEL_START.value)
    sampling = _sampling()
    considered = tuple(dict.fromkeys([*chosen, *offered, *(fitting_methods() if methods.AUTO in chosen else ())]))
    if not models.eagle and models.target is None and any(methods.METHODS[method].versions for method in considered):
        models = dataclasses.replace(models, eagle=_demo_heads(considered))
    models.check(chosen)
    made = Settings(
        models=models, methods=chosen, question_file=benchmark.question_file(_QUESTION_FILE.value),
        question_begin=_QUESTION_BEGIN.value, question_end=_QUESTION_END.value,
        max_new_tokens=_MAX_NEW_TOKENS.value or benchmark.max_new_tokens or suited.max_new_tokens,
        max_length=_MAX_LENGTH.value or max(suited.max_length, benchmark.max_length), sampling=sampling, seed=_SEED.value,
        reproducible=_REPRODUCIBLE.value,
        output_dir=pathlib.Path(_OUTPUT_DIR.value or _default_directory(experiment, models)),
        answer_file=pathlib.Path(_ANSWER_FILE.value) if _ANSWER_FILE.value else None, resume=_RESUME.value,
        slots=_SLOTS.value, benchmark=benchmark)
    _check_drafts(models, made.max_length)
    if made.slots > 1 and methods.AUTO in chosen:
        raise UserError(f"method auto chooses what decodes a single stream fastest; name a method beside --slots={made.slots}")
    return made


def _check_drafts(models: methods.Models, max_length: int) -> None:
    for name, drafted in (("tree_depth", models.tree.depth), ("draft_length", models.draft_length),
                          ("min_draft_length", models.min_draft_length)):
        if drafted >= max_length:
            raise UserError(f"--{name}={drafted} drafts more than the cache of {max_length} tokens holds; choose a smaller "
                            "one, or a larger --max_length")


def one_method() -> str:
    """The method that suits the models given, where only one runs."""
    if _MODEL.value is None and _DRAFTER.value is None and not _EAGLE.value:
        return "eagle3"
    if _EAGLE.value:
        return "hier" if _DRAFTER.value else f"eagle{head_version(_heads()[0])}"
    return "spec" if _DRAFTER.value else "baseline"


def no_arguments(argv: Sequence[str]) -> None:
    """A word that is no flag is a `UserError`."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options are spelled --name=value (--help lists them)")


def _methods(default: Sequence[str]) -> tuple[str, ...]:
    if _METHOD.value and _METHODS.value:
        raise UserError("--method and --methods were both given; choose one")
    chosen = (_METHOD.value,) if _METHOD.value else tuple(_METHODS.value or default)
    for method in chosen:
        if method not in methods.METHODS:
            raise UserError(f"method {method!r} is not known; choose of {', '.join(methods.METHODS)}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--methods={','.join(chosen)} names a method twice")
    return chosen


def _default_methods(suited: _Defaults) -> tuple[str, ...]:
    return suited.methods if not (_MODEL.value or _DRAFTER.value or _EAGLE.value) else all_methods()


def all_methods() -> tuple[str, ...]:
    """Those that the models given can be run with."""
    return ("baseline", "spec") if _MODEL.value else fitting_methods()


def fitting_methods() -> tuple[str, ...]:
    """All methods but, for a --drafter without a head of its own, hier: the demo model's heads fit no other small model."""
    heads_fit = _DRAFTER.value is None or _EAGLE.value
    return tuple(name for name in methods.NAMES if heads_fit or name != "hier")


def _heads() -> tuple[str, ...]:
    return tuple(str(hub.local(name)) for name in _EAGLE.value or ())


def _demo_heads(chosen: Sequence[str]) -> tuple[str, ...]:
    """Of the demo model, the one that drafts better first; they fit no other small model."""
    from checkpoints_tools import demo_model  # not needed for an own model

    if _DRAFTER.value and "hier" in chosen:
        return ()
    needed = {version for method in chosen for version in methods.METHODS[method].versions}
    return tuple(str(demo_model.head(version)) for version in sorted(needed, reverse=True))


def _tree(default: _Defaults) -> TreeConfig:
    depth, top_k = _TREE_DEPTH.value or default.tree_depth, _TREE_TOP_K.value or default.tree_top_k
    size = _TREE_SIZE.value or TreeConfig.fitting(depth, top_k, default.tree_size).size
    return TreeConfig(depth=depth, top_k=top_k, size=size)


def _sampling() -> Greedy | Sampling:
    if _TEMPERATURE.value:
        return Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
    if _TOP_K.value or _TOP_P.value != 1.0:
        raise UserError("--top_k and --top_p need a --temperature above 0; at 0 decoding is greedy")
    return Greedy()


def _default_directory(experiment: str, models: methods.Models) -> pathlib.Path:
    parts = [experiment, models.target_name, models.precision or ""]
    if _QUESTION_FILE.value:
        parts.append(pathlib.Path(_QUESTION_FILE.value).stem)
    return pathlib.Path("results") / "-".join(part for part in parts if part)
