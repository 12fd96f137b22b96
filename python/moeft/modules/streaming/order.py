"""Which layers will be wanted next, guessed from the last two."""

from __future__ import annotations


def upcoming(current: int, previous: int | None, count: int, depth: int) -> list[int]:
    """The ``depth`` layers that come after the current one, nearest first.

    Layers are used upwards in a forward pass and downwards in a backward pass, whether or not backward runs a layer's
    forward again. So the next one lies in the direction of the last move, which turns around at both ends. A wrong
    guess costs time, never correctness.

    Args:
        current: Number of the layer in use.
        previous: The one before it, another layer; None at the start.
        count: Number of layers.
        depth: How far to look.

    >>> upcoming(1, 0, 4, 2), upcoming(2, 3, 4, 2), upcoming(3, 2, 4, 2)
    ([2, 3], [1, 0], [2, 1])
    """
    if count < 2:
        return []
    step = -1 if previous is not None and current < previous else 1
    found: list[int] = []
    while len(found) < min(depth, count - 1):
        if not 0 <= current + step < count:
            step = -step
            if found:  # behind the turn come layers that are listed already
                break
        current += step
        found.append(current)
    return found
