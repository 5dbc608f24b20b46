"""Device time of one call of an op, as a decoding step sees it: warm code, cold weights, launch gaps included.

The calls stand one after the other in one jitted loop on the device, so that the host's part is paid once for thousands
of them. Three things would spoil that, and each shapes the program that `compile_loop` makes:

- XLA hoists out of a loop what does not change in it, and merges equal calls. An `optimization_barrier` between a call's
  operands and the results of the call before prevents both. It costs no launch, which any arithmetic between two calls
  would (about 2 us): on a GPU XLA expands it only when it has scheduled the program.
- XLA drops what nobody reads. The loop carries the results of all calls of a round.
- The weights of one call fit into the L2 cache. Calls go round copies that together exceed it. Every copy is an argument
  of its own: a slice of a stacked array would be copied before the kernel reads it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp

ROTATED_BYTES = 3 * 60 * 2**20  # three times the L2 of the largest GPU at hand, an H200
CALLS_A_ROUND = 32  # a round costs a launch of its own, for the loop's counter
_MOST_COPIES = 128  # compile time grows with the calls of a round; weights below 1.4 MB stay in the L2
_BANDWIDTH, _LAUNCH = 3e12, 3e-6  # bytes/s and s of a call, a guess that only sets the number of rounds

Operands = Sequence[jax.Array | jax.ShapeDtypeStruct]
_Results = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How the calls of a loop are laid out.

    Attributes:
      copies: sets of the operands that are read cold.
      repeats: how often a round goes through them.
      rounds: of the loop.
    """

    copies: int
    repeats: int
    rounds: int

    @classmethod
    def of(cls, *, cold_bytes: int, traffic: int, seconds: float) -> Self:
        """A plan for calls that move `traffic` bytes, `cold_bytes` of them from memory, in a loop of about `seconds`.

        On a CPU a loop is one call: XLA expands the barriers early there, and would merge equal calls.
        """
        if jax.default_backend() == "cpu":
            return cls(copies=1, repeats=1, rounds=1)
        copies = min(_MOST_COPIES, max(2, -(-ROTATED_BYTES // cold_bytes))) if cold_bytes else 1
        repeats = -(-CALLS_A_ROUND // copies)
        each = traffic / _BANDWIDTH + _LAUNCH
        return cls(copies=copies, repeats=repeats, rounds=max(1, round(seconds / (copies * repeats * each))))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A compiled loop over calls of one op.

    Attributes:
      executable: takes the different arrays among the operands, in order of appearance.
      calls: of the op, in all rounds together.
    """

    executable: Callable[[list[jax.Array]], tuple[list[_Results], _Results]]
    calls: int

    def __call__(self, copies: Sequence[Operands]) -> tuple[jax.Array, ...]:
        """Runs all calls, over operands that share arrays as those that the loop was compiled for.

        Returns the results of a call on the first copy; what is updated in place comes last, as all calls left it.
        """
        kept, state = jax.block_until_ready(self.executable(_distinct(copies)[0]))
        return *kept[0], *state


def compile_loop(step: Callable[..., Sequence[jax.Array]], copies: Sequence[Operands], plan: Plan, *,
                 carried: Mapping[int, int] | None = None) -> Loop:
    """Compiles a loop of `step(*operands)` over `copies`, without running it; threads may do so side by side.

    Args:
      step: the call, from operands to one or more arrays.
      copies: `plan.copies` sets of operands, arrays or abstract ones. What stands in several sets is passed once.
      plan: how the calls are laid out.
      carried: operands that the op updates in place: operand i of a call is result carried[i] of the call before, and
        zeros in the first call. XLA would copy them before every call otherwise.

    Raises whatever tracing, lowering or compiling `step` raises.
    """
    arrays, places = _distinct(copies)
    carried = carried or {}

    def split(results: Sequence[jax.Array]) -> tuple[_Results, _Results]:
        """The results that the loop keeps of every call, and those that the next call takes over."""
        kept = tuple(result for index, result in enumerate(results) if index not in carried.values())
        return kept, tuple(results[index] for index in carried.values())

    def one_round(carry: tuple[list[_Results], _Results], arrays: list[jax.Array]) -> tuple[list[_Results], _Results]:
        kept, state = [], carry[1]
        for indices in places * plan.repeats:
            operands = [arrays[index] for index in indices]
            # through the barrier goes the last call's result too, and what comes out of it is kept: XLA would leave out
            # of the barrier what is not used behind it
            operands, kept[-1:], state = jax.lax.optimization_barrier((operands, kept[-1:], state))
            for operand, value in zip(carried, state, strict=True):
                operands[operand] = value
            results, state = split(step(*operands))
            kept.append(results)
        return kept, state

    def program(arrays: list[jax.Array]) -> tuple[list[_Results], _Results]:
        results = jax.eval_shape(step, *(arrays[index] for index in places[0]))
        kept, state = split([jnp.zeros(result.shape, result.dtype) for result in results])
        start = [kept] * (plan.repeats * len(places)), state
        return jax.lax.fori_loop(0, plan.rounds, lambda _, carry: one_round(carry, arrays), start)

    executable = jax.jit(program).lower(arrays).compile()
    return Loop(executable, plan.rounds * plan.repeats * len(places))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a call, over several runs of a loop: their median, and the distance between their quartiles."""

    median: float
    spread: float


def median_time(loop: Loop, copies: Sequence[Operands], runs: int) -> Timing:
    """Times `runs` runs of a loop, behind one that is not counted.

    The host's part, about 0.1 ms a run, is counted: let a loop take a hundred times that.
    """
    loop(copies)
    seconds = sorted(run_time(loop, copies) for _ in range(runs))
    quarter = runs // 4
    return Timing(median=statistics.median(seconds), spread=seconds[-1 - quarter] - seconds[quarter])


def run_time(loop: Loop, copies: Sequence[Operands]) -> float:
    """Seconds a call of one run of a loop."""
    start = time.perf_counter()
    loop(copies)
    return (time.perf_counter() - start) / loop.calls


def _distinct(copies: Sequence[Operands]) -> tuple[list, list[list[int]]]:
    """The different arrays in order of appearance, and where each set's operands stand among them."""
    index = {}
    places = [[index.setdefault(id(array), len(index)) for array in operands] for operands in copies]
    by_id = {id(array): array for operands in copies for array in operands}
    return [by_id[key] for key in index], places
