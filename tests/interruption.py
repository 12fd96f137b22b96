"""A progress callback that interrupts, as a kill would."""

from __future__ import annotations

from collections.abc import Callable


class KilledError(Exception):
    """Raised in place of a kill."""


def kill_at(step: int) -> Callable[[int, int, str], None]:
    """A callback ``progress(done, total, what)`` that raises when ``done`` reaches ``step``."""

    def progress(done: int, total: int, what: str) -> None:
        if done == step:
            raise KilledError

    return progress
