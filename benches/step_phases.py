"""Looks at steps of a running training: a callback that takes one look after another, each at whole steps.

A step is counted from the end of one to the end of the next, so that data, logging and callbacks are part of it.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from transformers import TrainerCallback

WARM_STEPS = 5


class Look(Protocol):
    """Something that watches steps."""

    steps: int

    def begin(self) -> None:
        """Start to watch; the next step is the first."""

    def end(self) -> None:
        """The last step has ended."""


class Looks(TrainerCallback):
    """Takes the looks in turn, each for its number of steps, and stops the training."""

    def __init__(self, looks: list[Look]) -> None:
        self._looks = looks
        self._left = WARM_STEPS
        self._next = 0

    @property
    def steps(self) -> int:
        """Steps that all of it takes."""
        return WARM_STEPS + sum(look.steps for look in self._looks)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._left -= 1
        if self._left:
            return
        if self._next:
            self._looks[self._next - 1].end()
        if self._next == len(self._looks):
            control.should_training_stop = True
            return
        look = self._looks[self._next]
        self._left = look.steps
        self._next += 1
        look.begin()


class Clock:
    """Wall and CPU time of a step, nothing else watching."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.wall_seconds = self.cpu_seconds = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.wall_seconds = (time.perf_counter() - self._began[0]) / self.steps
        self.cpu_seconds = (time.process_time() - self._began[1]) / self.steps
