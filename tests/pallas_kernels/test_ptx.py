"""What XLA's Triton makes of the kernels for an H200, with the configs that run there."""

import pytest
from hopper import left_in_flight, ptx_of

from experiments.kernels import problems
from experiments.timing.sizes import SHAPES
from pallas_kernels import launch

PRODUCTS = ("w4a16", "w4a8", "w8a16", "w8a8", "dense", "attention")
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2}, {%r3,%r4}, %rd1, 1, 1, 1;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"


def loop(*lines: str) -> str:
    return "\n".join(["$L__BB0_1:", *lines, "@%p1 bra \t$L__BB0_1;", WAIT])


@pytest.mark.parametrize(("ptx", "loops"), [
    (loop(PRODUCT, COMMIT, WAIT), 0),
    (loop(PRODUCT, COMMIT), 1),
    (loop(PRODUCT, COMMIT, WAIT, PRODUCT, COMMIT), 1),  # two products, of which Triton waits for the first
    (loop(PRODUCT, COMMIT, WAIT.replace("0", "1")), 1),
    (loop(PRODUCT.replace("{%r3,%r4}", "%rd2"), COMMIT), 0),  # of shared memory alone, which has several buffers
    ("\n".join([PRODUCT, COMMIT]), 0),
])
def test_what_counts_as_left_in_flight(ptx, loops):
    assert left_in_flight(ptx) == loops


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [8, 64, 128, 512])
@pytest.mark.parametrize("op", list(problems.OPS))
def test_every_op_compiles_and_waits_for_its_products(op, rows, monkeypatch):
    monkeypatch.setattr(launch, "tuned", lambda op, key: launch._table(launch._path(op, "nvidia_h200")).get(key))
    shapes = [SHAPES[name] for name in ("llama3-8b", "demo")]
    groups = (32, 64, 128, -1) if op == "w4a16" else (128,)
    for problem in problems.find(op, shapes, [rows], groups):
        case = problem.cases[0]
        [operands] = case.abstract_operands(1)[:1]
        kernels = ptx_of(case.step(None, "kernel"), *operands)
        assert kernels or op not in PRODUCTS, problem.keys
        # attention's second product is, and little is written before it is waited for (LOG)
        assert op == "attention" or not any(map(left_in_flight, kernels)), problem.keys
