"""What was measured, and whether it is bad enough to act."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Reading:
    """One capability at one step."""

    name: str
    value: float
    low: float
    """Of its interval; NaN where there is none."""
    high: float
    num: int
    """Items behind it."""
    better: Literal["higher", "lower"] = "higher"
    is_of_few: bool = False
    """Whether there are too few items to trust the interval."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Bound:
    """How bad a reading may be."""

    limit: float | None = None
    """Worst value."""
    change: float | None = None
    """Largest change for the worse against the base."""
    intervals: float | None = None
    """The same in half-widths of the base's interval."""

    def breach(self, reading: Reading, base: Reading) -> str | None:
        """Why a reading is too bad, or None; a value that is not a number is."""
        if not math.isfinite(reading.value):
            return f"{reading.name} is {reading.value}"
        sign = 1 if reading.better == "higher" else -1
        worst = [
            (bound, text)
            for bound, text in (
                (self.limit, "its limit"),
                (None if self.change is None else base.value - sign * self.change, f"base {base.value:.4g}, change"),
                (
                    self._by_intervals(base, sign),
                    f"base {base.value:.4g}, {self.intervals} half-widths of its interval",
                ),
            )
            if bound is not None
        ]
        for bound, text in worst:
            if sign * (reading.value - bound) < 0:
                few = ", of fewer than 30 items" if reading.is_of_few else ""
                return f"{reading.name} is {reading.value:.4g}, beyond {bound:.4g} ({text}){few}"
        return None

    def _by_intervals(self, base: Reading, sign: int) -> float | None:
        if self.intervals is None:
            return None
        half_width = (base.high - base.low) / 2
        # Of a single item nothing is known about chance, so nothing that happens to it is a breach.
        if math.isnan(half_width):
            return None
        # Resampling items that all agree finds no width. A share of 0 or 1 has an interval 3 / n wide (rule of three),
        # and half of it is 1.5 / n.
        return base.value - sign * self.intervals * (half_width or 1.5 / base.num)
