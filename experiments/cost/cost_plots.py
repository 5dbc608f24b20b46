"""The paper's curves: what more rows cost a verification, and which tree size pays."""

import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.cost.cost_study import Findings
from experiments.display.colors import colors
from experiments.display.plots import save


def plot(findings: Findings, title: str, path: pathlib.Path) -> None:
    """Draws T_v(n)/T_v(1) by precision and the predicted speedup by the draft's nodes, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    verify, speedups = figure.subplots(1, 2)
    palette = colors(findings.verify)
    for name, curve in findings.verify.items():
        one = curve.seconds[0]
        verify.plot(curve.at, [seconds / one for seconds in curve.seconds], marker="o", markersize=3.5, color=palette[name],
                    label=name)
        verify.fill_between(curve.at, [seconds / one for seconds in curve.fastest.seconds],
                            [seconds / one for seconds in curve.slowest.seconds], color=palette[name], alpha=0.15, linewidth=0)
    verify.set(xlabel="n, tokens verified at once", ylabel="T_v(n) / T_v(1)", ylim=(0, None))
    verify.set_title("Cost of a verification; shaded: fastest to slowest run", fontsize=10)
    _speedups(speedups, findings)
    for panel in (verify, speedups):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, color="#e5e5e5")
        panel.set_axisbelow(True)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def best_by_nodes(findings: Findings, method: str) -> dict[int, float]:
    """The best predicted speedup of each number of drafted nodes, the root counted: those of a tree, of the hierarchy's inner
    tree, or of a chain."""
    best: dict[int, float] = {}
    for prediction in findings.predictions:
        if prediction.choice.method == method:
            nodes = prediction.choice.draft_length + 1 if method == "spec" else prediction.choice.tree.size
            best[nodes] = max(best.get(nodes, 0.0), prediction.speedup)
    return dict(sorted(best.items()))


def _speedups(panel: Axes, findings: Findings) -> None:
    palette = colors(findings.methods)
    for method in findings.methods:
        if method == "baseline":
            panel.axhline(1.0, color=palette[method], linestyle="--", linewidth=1, label="baseline")
        else:
            curve = best_by_nodes(findings, method)
            panel.plot(list(curve), list(curve.values()), marker="o", markersize=3.5, color=palette[method],
                       label=method)
    panel.set(xlabel="nodes of the draft (hier: of the inner tree)", ylabel="predicted speedup, best depth", ylim=(0, None))
    panel.set_title("Speedup by tree size", fontsize=10)
