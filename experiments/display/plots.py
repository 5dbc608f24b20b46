"""Pictures of a run, of a comparison and of a sweep."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.display.cells import number, times
from experiments.display.colors import PLAIN, colors
from specmq_jax.files import written
from specmq_jax.words import count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a chart of speedups.

    Attributes:
      group: what it stands with on the axis, for example a precision.
      series: `PLAIN`, or what drafts.
      speedup: over the chart's base.
      relative: over the group's plain bar; None for that bar, and where there is none.
    """

    group: str
    series: str
    speedup: float
    relative: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One panel of a figure of heat maps.

    Attributes:
      title: above it.
      x, y: what the axes are.
      columns, rows: the axes' values.
      values: one for each (row, column); a place without one stays empty.
    """

    title: str
    x: str
    y: str
    columns: tuple[int | str, ...]
    rows: tuple[int | str, ...]
    values: Mapping[tuple[int | str, int | str], float]


def save(figure: Figure, path: pathlib.Path) -> None:
    """Puts a picture in place as a whole, of the kind that its suffix names; errors as in `files.written`."""
    with written(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))


def plot(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws tokens/s of each method, and accept lengths and acceptance by depth of those that speculate, as a PNG."""
    figures = summary["methods"]
    palette = colors(figures)
    speculating = {name: f for name, f in figures.items() if sum(f["accept_histogram"][1:])}
    panels = 3 if speculating else 1
    figure = Figure(figsize=(1.2 + 4.4 * panels, 4.0), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    asked = f"{summary['benchmark']}, {count(summary['questions'], 'question')}"
    _speeds(axes[0], figures, palette, asked)
    if speculating:
        _accept_lengths(axes[1], speculating, palette)
        _depths(axes[2], speculating, palette)
    for panel in axes:
        _clean(panel)
    figure.suptitle(f"{summary['model']} at {summary['precision']} on {summary['device']}\n{asked}",
                    fontsize=11)
    save(figure, path)


def _speeds(panel: Axes, figures: Mapping[str, Any], palette: Mapping[str, Any], asked: str) -> None:
    heights = [figure["tokens_per_second"] or 0.0 for figure in figures.values()]
    names = [f"{method}:\n{figure['chosen']['method']}" if figure["chosen"] else method for method, figure in figures.items()]
    bars = panel.bar(names, heights, width=0.55, color=[palette[method] for method in figures])
    labels = [number(figure["tokens_per_second"], 1)
              + (f"\n{times(figure['speedup'])}" if figure["speedup"] is not None and method != "baseline" else "")
              for method, figure in figures.items()]
    panel.bar_label(bars, labels, padding=2)
    panel.set(ylim=(0, max(heights) * 1.2 or 1.0), xlim=(-0.7, max(len(figures), 2) - 0.3), ylabel=f"tokens/s ({asked})")
    panel.set_title("Speed", fontsize=10)


def _accept_lengths(panel: Axes, figures: Mapping[str, Any], palette: Mapping[str, Any]) -> None:
    width, tallest, longest = 0.8 / len(figures), 0.0, 0
    for i, (method, figure) in enumerate(figures.items()):
        offset, counts = (i - (len(figures) - 1) / 2) * width, figure["accept_histogram"]
        longest = max(longest, len(counts))
        shares = [100 * count / sum(counts) for count in counts]
        tallest = max(tallest, *shares)
        panel.bar([length + offset for length in range(1, len(counts) + 1)], shares, width=width, color=palette[method],
                  label=f"{method}, mean {figure['mean_accept_length']:.2f}")
    panel.set(ylim=(0, tallest * (1.1 + 0.08 * len(figures))), xticks=range(1, longest + 1),
              xlabel="tokens accepted in a round", ylabel="% of rounds")
    panel.set_title("Accept length", fontsize=10)
    panel.legend(frameon=False, fontsize=9)


def _depths(panel: Axes, figures: Mapping[str, Any], palette: Mapping[str, Any]) -> None:
    for method, figure in figures.items():
        shares = [100 * share for share in figure["depth_acceptance"]]
        panel.plot(range(1, len(shares) + 1), shares, marker="o", markersize=4, color=palette[method])
    deepest = max(len(figure["depth_acceptance"]) for figure in figures.values())
    panel.set(ylim=(0, 104), xticks=range(1, deepest + 1), xlabel="draft's depth", ylabel="% of rounds that came so far")
    panel.set_title("Acceptance by depth", fontsize=10)


def plot_speedups(bars: Sequence[Bar], path: pathlib.Path, *, base: str, title: str) -> None:
    """Draws each bar's speedup over `base`, the relative one printed above, as figure 1 of arXiv:2505.22179 does.

    Args:
      bars: groups in order of their first bars; plain ones come first in each.
      path: the file, whose suffix says what kind of picture it is.
      base: what has a speedup of 1.
      title: above the chart.
    """
    groups = {name: [bar for bar in bars if bar.group == name] for name in dict.fromkeys(bar.group for bar in bars)}
    series = sorted(dict.fromkeys(bar.series for bar in bars), key=lambda name: name != PLAIN)
    palette = colors(series)
    figure = Figure(figsize=(max(5.0, 1.2 + 0.4 * len(groups) + 0.6 * len(bars)), 4.2), layout="constrained")
    panel = figure.subplots()
    for name in series:
        mine = [(i, present, bar) for i, present in enumerate(groups.values()) for bar in present if bar.series == name]
        drawn = panel.bar([_place(i, bar, present, series) for i, present, bar in mine], [bar.speedup for _, _, bar in mine],
                          width=0.8 / len(series), color=palette[name], edgecolor="white", label=name)
        labels = [times(bar.speedup if bar.relative is None else bar.relative) for _, _, bar in mine]
        panel.bar_label(drawn, labels, padding=2, fontsize=8,
                        fontweight="bold" if any(bar.relative is not None for _, _, bar in mine) else "normal")
    panel.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(groups)), list(groups))
    panel.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, max(bar.speedup for bar in bars) * 1.12), ylabel=f"speedup over {base}")
    if any(bar.relative is not None for bar in bars):
        panel.set_title("bold: relative to plain decoding of the same model and precision", fontsize=9)
    _clean(panel)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=min(len(series), 5))
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _place(group: int, bar: Bar, present: Sequence[Bar], series: Sequence[str]) -> float:
    """Where a bar stands: the ones of a group side by side around its tick, without gaps for series that it lacks."""
    order = sorted(series.index(other.series) for other in present)
    return group + (order.index(series.index(bar.series)) - (len(order) - 1) / 2) * 0.8 / len(series)


def plot_throughput(curves: Mapping[str, Sequence[tuple[float, float]]], path: pathlib.Path, *, title: str) -> None:
    """Draws tokens/s of all sequences against those of one, a point a batch size; both axes are logarithmic."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    for name, points in curves.items():
        panel.plot(*zip(*points, strict=True), marker="o", label=name)
    panel.set(xscale="log", yscale="log", xlabel="tokens/s of a user", ylabel="tokens/s of all", title=title)
    panel.grid(visible=True, which="both", alpha=0.3)
    panel.legend(fontsize="small")
    save(figure, path)


def plot_heat_maps(maps: Sequence[HeatMap], path: pathlib.Path, *, unit: str, title: str) -> None:
    """Draws the panels side by side, three in a row at most, each with its values in its fields, as a PNG."""
    across = min(len(maps), 3)
    down = -(-len(maps) // across)
    wide = max(0.75 * len(heat.columns) for heat in maps) + 1.6
    high = max(0.45 * len(heat.rows) for heat in maps) + 1.2
    figure = Figure(figsize=(max(5.0, wide * across), max(2.6, high * down + 0.4)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, heat in zip(panels, maps, strict=False):
        _heat(panel, heat, figure, unit)
    for panel in panels[len(maps):]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _heat(panel: Axes, heat: HeatMap, figure: Figure, unit: str) -> None:
    values = np.array([[heat.values.get((row, column), np.nan) for column in heat.columns] for row in heat.rows])
    image = panel.imshow(values, cmap="viridis", aspect="auto", origin="lower")
    darkest_bright = np.nanmin(values) + 0.6 * (np.nanmax(values) - np.nanmin(values))
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            panel.text(x, y, number(value, 1), ha="center", va="center", fontsize=8,
                       color="black" if value > darkest_bright else "white")
    panel.set_xticks(range(len(heat.columns)), [str(column) for column in heat.columns])
    panel.set_yticks(range(len(heat.rows)), [str(row) for row in heat.rows])
    panel.set(xlabel=heat.x, ylabel=heat.y)
    panel.set_title(heat.title, fontsize=10)
    figure.colorbar(image, ax=panel, label=unit)


def _clean(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.yaxis.grid(True, color="#e5e5e5")
    panel.set_axisbelow(True)
