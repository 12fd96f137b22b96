"""Sizes of Triton's blocks."""


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below a size."""
    return 1 << max(0, size - 1).bit_length()
