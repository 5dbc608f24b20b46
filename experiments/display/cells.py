"""How figures are written, in tables and in words.

A dash stands for a figure that was not measured, or that there is none of. A number that rounds to zero and isn't zero keeps
a digit, and a share that rounds to none or to all and is neither says so.
"""

NO_VALUE = "-"


def number(value: float | None, digits: int) -> str:
    """With `digits` decimals; what these would show as zero keeps its first digit instead. None is a dash."""
    if value is None:
        return NO_VALUE
    shown = f"{value:z.{digits}f}"
    return f"{value:.1g}" if value and not float(shown) else shown


def significant(value: float, digits: int = 3) -> str:
    """With so many digits, and every one of a larger number's whole part."""
    return f"{value:.0f}" if abs(value) >= 10 ** digits else f"{value:.{digits}g}"


def milliseconds(seconds: float | None, digits: int = 2) -> str:
    """A time in ms. A negative one, which only a difference of times can be, was not measured."""
    return number(1e3 * seconds, digits) if seconds is not None and seconds >= 0 else NO_VALUE


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1 in percent: 100% is all and 0% is none. None is a dash."""
    if share is None:
        return NO_VALUE
    step = 10.0 ** -digits
    if 0 < share and 100 * share < step / 2:
        return f"<{step:.{digits}f}%"
    if share < 1 and 100 * share >= 100 - step / 2:
        return f">{100 - step:.{digits}f}%"
    return f"{share:z.{digits}%}"


def part(share: float | None) -> str:
    """A share of what should be the most there can be; more than all is said without a number."""
    return ">100%" if share is not None and share >= 1.005 else percent(share)


def change(share: float | None) -> str:
    """A signed share in percent, with one decimal."""
    return NO_VALUE if share is None else f"{share:+z.1%}"


def times(ratio: float | None) -> str:
    """A ratio as "1.25x". None is a dash."""
    if ratio is None:
        return NO_VALUE
    return f"{ratio:.2f}x" if ratio >= 0.005 else "<0.01x"
