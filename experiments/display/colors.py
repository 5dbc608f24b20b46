"""One colour for each method, the same in every picture."""

import colorsys
from collections.abc import Iterable

Color = tuple[float, float, float] | str

PLAIN = "plain"
"""The series of decoding without a drafter."""
_OF_METHODS = {"baseline": "#8c8c8c", "spec": "#1f77b4", "eagle2": "#d95f02", "eagle3": "#1b9e77", "hier": "#7570b3",
               "auto": "#e6ab02"}
_OTHERS = ("#8c564b", "#e377c2", "#17becf", "#a6cee3", "#b2df8a", "#333333")
_GOLDEN = 0.618034
"""Of a turn of the hue: steps of it never come near one another."""


def colors(names: Iterable[str]) -> dict[str, Color]:
    """A colour for each name.

    A method's is its own in every picture; "+ eagle2" is method eagle2, and `PLAIN` is the baseline. Other names take further
    colours in the order given, each its own, however many there are.
    """
    found: dict[str, Color] = {}
    others = 0
    for name in dict.fromkeys(names):
        method = "baseline" if name == PLAIN else name.removeprefix("+ ")
        if method in _OF_METHODS:
            found[name] = _OF_METHODS[method]
        else:
            found[name], others = _further(others), others + 1
    return found


def _further(index: int) -> Color:
    if index < len(_OTHERS):
        return _OTHERS[index]
    turn = index - len(_OTHERS)
    return colorsys.hsv_to_rgb(turn * _GOLDEN % 1, 0.45 + 0.5 * (turn % 3) / 2, 0.6 + 0.3 * (turn % 2))
