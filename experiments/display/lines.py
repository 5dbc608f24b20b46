"""Lines of text for a terminal, a pipe or a file."""

from rich.console import Console


def say(console: Console, text: str, *, wrap: bool = False) -> None:
    """Prints a text to the letter, without markup or colours; lines wider than the console are broken where they may `wrap`."""
    console.print(text, highlight=False, markup=False, soft_wrap=not wrap)
