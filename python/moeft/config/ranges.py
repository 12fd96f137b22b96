"""Whole numbers as people list them: ``[0, 3, "8-15"]``."""

from collections.abc import Iterable

Numbers = Iterable[int | str]
"""Whole numbers, each an ``int``, its text, or an inclusive range such as ``"8-15"``."""


def expand(numbers: Numbers, what: str) -> tuple[int, ...]:
    """Every number that is listed, sorted, each once.

    Args:
        numbers: Numbers and inclusive ranges.
        what: What they count, for messages: "layers".

    Raises:
        ValueError: If an item is neither, a range runs backwards, or nothing is listed.

    >>> expand([5, "0-2", "1"], "layers")
    (0, 1, 2, 5)
    """
    found: set[int] = set()
    for item in [numbers] if isinstance(numbers, str) else numbers:
        first, dash, last = str(item).partition("-")
        if isinstance(item, bool) or not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{what} holds {item!r}, expected whole numbers from 0, or ranges such as '0-3'")
        if dash and int(last) < int(first):
            raise ValueError(f"{what} holds {item!r}, which runs backwards; write '{last}-{first}'")
        found.update(range(int(first), int(last or first) + 1))
    if not found:
        raise ValueError(f"{what} is empty, expected at least one number")
    return tuple(sorted(found))
