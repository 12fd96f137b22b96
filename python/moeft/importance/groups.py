"""Weights in groups whose accumulators fit into memory together, in the order of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ACCUMULATOR_BYTES = 4


def groups_within(sizes: Mapping[str, int], memory_bytes: int) -> list[Sequence[str]]:
    """Cut weights into runs of as many as fit.

    Args:
        sizes: Name -> elements, in the order of the layers.
        memory_bytes: Most bytes that the float32 accumulators of a run may take.

    Returns:
        Names of each run.

    Raises:
        ValueError: If one weight alone does not fit.
    """
    groups: list[list[str]] = []
    room = 0
    for name, elements in sizes.items():
        needed = elements * ACCUMULATOR_BYTES
        if needed > memory_bytes:
            raise ValueError(f"memory is {memory_bytes:,} bytes, but {name} alone needs {needed:,}; give it that much")
        if not groups or needed > room:
            groups.append([])
            room = memory_bytes
        groups[-1].append(name)
        room -= needed
    return list(groups)
