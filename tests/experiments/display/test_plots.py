"""What the pictures show: heights, numbers and names are read off the drawn figure."""

import pytest
from matplotlib.figure import Figure

from experiments.display import plots
from experiments.display.plots import PLAIN, Bar, HeatMap


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws into a file and returns the figure."""
    figures, save = [], Figure.savefig

    def keep(self, path, **options):
        save(self, path, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(plot, *arguments, **options):
        path = tmp_path / "picture.png"
        plot(*arguments, path, **options)
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


BARS = [Bar(group="fp16", series=PLAIN, speedup=1.0, relative=None),
        Bar(group="fp16", series="+ eagle2", speedup=2.3, relative=2.3),
        Bar(group="w4a16", series="+ eagle2", speedup=3.2, relative=1.6),
        Bar(group="w4a16", series=PLAIN, speedup=2.0, relative=None),
        Bar(group="w8a8", series="+ spec", speedup=1.5, relative=None)]


def test_bars_are_as_high_as_the_speedup_and_bear_the_relative_one(drawn):
    figure = drawn(plots.plot_speedups, BARS, base="fp16/baseline", title="A model")
    (panel,) = figure.axes
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in panel.containers}
    assert heights == {PLAIN: [1.0, 2.0], "+ eagle2": [2.3, 3.2], "+ spec": [1.5]}
    assert {text.get_text() for text in panel.texts} == {"1.00x", "2.30x", "1.60x", "2.00x", "1.50x"}
    bold = {text.get_text() for text in panel.texts if text.get_fontweight() == "bold"}
    assert bold == {"2.30x", "1.60x"}
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["fp16", "w4a16", "w8a8"]
    assert panel.get_ylabel() == "speedup over fp16/baseline"


def test_bars_of_a_group_stand_side_by_side_around_their_tick(drawn):
    (panel,) = drawn(plots.plot_speedups, BARS, base="b", title="t").axes
    spans = {}
    for container in panel.containers:
        for bar in container:
            spans.setdefault(round(bar.get_x() + bar.get_width() / 2), []).append((bar.get_x(), bar.get_x() + bar.get_width()))
    for tick, found in spans.items():
        found.sort()
        assert found[0][0] + found[-1][1] == pytest.approx(2 * tick)
        assert all(right == pytest.approx(left) for (_, right), (left, _) in zip(found, found[1:], strict=False))


def test_every_series_has_a_colour_of_its_own(drawn):
    many = [Bar(group="fp16", series=f"run {i}", speedup=1.0 + i, relative=None) for i in range(8)]
    (panel,) = drawn(plots.plot_speedups, many, base="b", title="t").axes
    assert len({container[0].get_facecolor() for container in panel.containers}) == 8


def test_fields_of_heat_maps_hold_their_values_and_missing_ones_stay_empty(drawn):
    maps = [HeatMap(title=f"eagle2 at {name}", x="tree size", y="tree depth", columns=(8, 16, 32), rows=(2, 4),
                    values={(2, 8): 10.0, (2, 16): 20.0, (4, 16): 30.0, (4, 32): 25.0}) for name in ("fp16", "w8a8")]
    figure = drawn(plots.plot_heat_maps, maps, unit="tokens/s", title="A model")
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert [panel.get_title() for panel in panels] == ["eagle2 at fp16", "eagle2 at w8a8"]
    fields = {text.get_position(): text.get_text() for text in panels[0].texts}
    assert fields == {(0, 0): "10.0", (1, 0): "20.0", (1, 1): "30.0", (2, 1): "25.0"}
    assert (panels[0].get_xlabel(), panels[0].get_ylabel()) == ("tree size", "tree depth")
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["8", "16", "32"]
    assert [panel.get_ylabel() for panel in figure.axes if panel not in panels] == ["tokens/s", "tokens/s"]


def test_a_map_of_a_single_value_can_be_drawn(drawn):
    drawn(plots.plot_heat_maps, [HeatMap(title="t", x="x", y="y", columns=(1,), rows=("fp16",), values={("fp16", 1): 5.0})],
          unit="tokens/s", title="A model")
