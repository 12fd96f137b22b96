"""Which part of the computation ran out of memory: a note on the error, with what makes that part smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def naming(part: str, knob: str) -> Iterator[None]:
    """Note on an out-of-memory error that passes what was computed, and what to change; the innermost note stays alone.

    Args:
        part: What runs inside, such as "the backward pass of an expert block".
        knob: What makes it smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not notes_of(error):
            error.add_note(f"in {part}: {knob}")
        raise


def notes_of(error: BaseException) -> list[str]:
    """Notes of an error, oldest first."""
    return list(getattr(error, "__notes__", ()))
