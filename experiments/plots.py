"""Pictures of a run."""

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#8c8c8c", "#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
"""Grey for the first method, the baseline of a default run."""


def plot(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws tokens/s of each method, and accept lengths and acceptance by depth of those that speculate, as a PNG."""
    figures = summary["methods"]
    colors = {method: COLORS[i % len(COLORS)] for i, method in enumerate(figures)}
    speculating = {name: f for name, f in figures.items() if sum(f["accept_histogram"][1:])}
    panels = 3 if speculating else 1
    figure = Figure(figsize=(1.2 + 4.4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _speeds(axes[0], figures, colors)
    if speculating:
        _accept_lengths(axes[1], speculating, colors)
        _depths(axes[2], speculating, colors)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.grid(True, color="#e5e5e5")
        panel.set_axisbelow(True)
    figure.suptitle(f"{summary['model']} at {summary['precision']} on {summary['device']}", fontsize=11)
    figure.savefig(path, dpi=150)


def _speeds(panel: Axes, figures: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    heights = [figure["tokens_per_second"] for figure in figures.values()]
    bars = panel.bar(list(figures), heights, width=0.55, color=[colors[method] for method in figures])
    labels = [f"{height:.1f}" + (f"\n{figure['speedup']:.2f}x" if figure["speedup"] and method != "baseline" else "")
              for (method, figure), height in zip(figures.items(), heights, strict=True)]
    panel.bar_label(bars, labels, padding=2)
    panel.set_ylim(0, max(heights) * 1.2)
    panel.set_xlim(-0.7, max(len(figures), 2) - 0.3)
    panel.set_ylabel("tokens/s")
    panel.set_title("Speed", fontsize=10)


def _accept_lengths(panel: Axes, figures: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    width, tallest, longest = 0.8 / len(figures), 0.0, 0
    for i, (method, figure) in enumerate(figures.items()):
        offset, counts = (i - (len(figures) - 1) / 2) * width, figure["accept_histogram"]
        longest = max(longest, len(counts))
        shares = [100 * count / sum(counts) for count in counts]
        tallest = max(tallest, *shares)
        panel.bar([length + offset for length in range(1, len(counts) + 1)], shares, width=width, color=colors[method],
                  label=f"{method}, mean {figure['mean_accept_length']:.2f}")
    panel.set_ylim(0, tallest * (1.1 + 0.08 * len(figures)))
    panel.set_xticks(range(1, longest + 1))
    panel.set_xlabel("tokens accepted in a round")
    panel.set_ylabel("% of rounds")
    panel.set_title("Accept length", fontsize=10)
    panel.legend(frameon=False, fontsize=9)


def _depths(panel: Axes, figures: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    for method, figure in figures.items():
        shares = [100 * share for share in figure["depth_acceptance"]]
        panel.plot(range(1, len(shares) + 1), shares, marker="o", markersize=4, color=colors[method])
    panel.set_ylim(0, 104)
    panel.set_xticks(range(1, max(len(figure["depth_acceptance"]) for figure in figures.values()) + 1))
    panel.set_xlabel("draft's depth")
    panel.set_ylabel("% of rounds that came so far")
    panel.set_title("Acceptance by depth", fontsize=10)
