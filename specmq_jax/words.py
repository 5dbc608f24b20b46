"""Words for what is printed."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number and what it counts: "1 token", "2 tokens"; `plural` is for nouns that don't just add an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
