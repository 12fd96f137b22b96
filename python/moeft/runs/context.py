"""What the steps of one run share: recipe, run folder, figures, and where to print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from moeft.config import TuningRecipe
from moeft.provenance import RunFolder

R = TypeVar("R", bound=TuningRecipe)


@dataclass
class RunContext(Generic[R]):
    """A run that has begun, for the first time or again.

    Attributes:
        recipe: The resolved recipe.
        folder: The open run folder.
        show: Where to print what is found.
        metrics: Content of ``metrics.json``, with the figures of earlier starts; written after every stage.
    """

    recipe: R
    folder: RunFolder
    show: Callable[[str], None]
    metrics: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = self.folder.read_json("metrics.json") or {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record when a stage starts and finishes, and keep its figures even if it fails."""
        start = time.perf_counter()
        self.folder.event("stage", name=name, status="started", seconds=0.0)
        try:
            yield
        finally:
            self.folder.write_json("metrics.json", self.metrics)
        self.folder.event("stage", name=name, status="finished", seconds=time.perf_counter() - start)
