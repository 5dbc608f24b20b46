"""The kernel benchmark at sizes small enough for a CPU."""

import dataclasses
import io
import json

import pytest
from rich.console import Console
from typed import commands

from experiments import kernel_bench
from experiments.kernel_bench import OPS, Bench
from experiments.timing import device
from experiments.timing.sizes import SHAPES

FEW = Bench(rows=(2,), runs=4)


@pytest.fixture
def console(monkeypatch) -> Console:
    monkeypatch.setattr(device, "device_bandwidth", lambda: 1e11)
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
def test_every_op_is_timed_and_told(console, tmp_path):
    lines = kernel_bench.run(FEW, list(OPS), ["tiny"], tmp_path / "figures.json", console)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["lines"] == [dataclasses.asdict(line) for line in lines] and figures["runs"] == 4
    assert {line.op for line in lines} == set(OPS)
    for line in lines:
        assert line.error is None and line.rows == 2 and 0 <= line.spread and 0 < line.seconds < 10
        assert line.bandwidth * line.seconds == pytest.approx(line.traffic)
        assert (line.xla_seconds is None) == (line.op in ("attention", "silu_mul"))
    text = console.file.getvalue()
    assert all(f"{op}, tiny" in text for op in OPS) and all(line.shape in text for line in lines)
    assert "Marlin" not in text


def test_a_kernel_that_fails_is_told_and_costs_no_other_figure(console, monkeypatch):
    _, norms = OPS["norm"]

    def failing(bench, model, rows):
        def broken(config, implementation, *operands):
            raise ValueError("out of shared memory\nand more")

        items = list(norms(bench, model, rows))
        return [dataclasses.replace(items[0], case=dataclasses.replace(items[0].case, run=broken)), *items]

    monkeypatch.setitem(OPS, "norm", ((2,), failing))
    broken, right = kernel_bench.run(FEW, ["norm"], ["tiny"], console=console)
    assert broken.error == "out of shared memory" and broken.seconds is None
    assert right.error is None and right.seconds > 0
    assert f"{broken.shape}, 2 rows: out of shared memory" in console.file.getvalue()


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H200", True), ("NVIDIA A100", False)])
def test_the_peers_times_stand_beside_the_device_they_were_measured_on(name, known, monkeypatch):
    monkeypatch.setattr(device, "device_name", lambda: name)
    for model in ("llama3-8b", "llama3-70b"):
        for op in ("w4a16", "w4a16_product"):
            items = Bench().items(op, SHAPES[model])
            assert items and all((item.marlin is not None) == known for item in items)
    assert all(item.marlin is None for item in Bench(group_size=64).items("w4a16", SHAPES["llama3-8b"]))


MISTAKES = [
    (["--ops=nonsense"], "--ops names 'nonsense', which is not known; choose of w4a16"),
    (["--shapes=llama9"], "--shapes names 'llama9'"),
    (["--rows=0"], "--rows=0 must list whole numbers above 0"),
    (["--json=/nowhere/figures.json"], "/nowhere/figures.json can't be written to"),
]


@pytest.fixture(scope="module")
def mistaken():
    typed = (("experiments.kernel_bench", *arguments) for arguments, _ in MISTAKES)
    return commands(*typed, shared="experiments.running.flags")


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=[fault for _, fault in MISTAKES])
def test_a_mistake_ends_in_one_line(mistaken, place):
    result = mistaken[place]
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"error: {MISTAKES[place][1]}") and len(result.stderr.splitlines()) == 1
