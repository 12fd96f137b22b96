"""Estimates with confidence intervals, by resampling what was measured, and of shares by formula.

Source:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3: the percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEW = 30
"""Below this many units an interval is too narrow as often as not; figures of fewer are marked."""

Statistic = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample, and an interval for that of the population."""

    value: float
    low: float
    """NaN with fewer than two units, which say nothing about spread."""
    high: float
    level: float
    """Share of samples whose interval holds the population's figure, about."""
    num: int
    """Units of the sample."""

    @property
    def is_of_few(self) -> bool:
        """Whether there are too few units to trust the interval."""
        return self.num < FEW

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def mean(sample: NDArray[np.float64]) -> float:
    """Mean over all units."""
    return float(sample.mean())


def bootstrap(
    sample: ArrayLike, statistic: Statistic = mean, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """A statistic with its percentile bootstrap interval.

    Units that depend on each other, such as the turns of a conversation, have to be one unit.

    Args:
        sample: ``[n]`` or ``[n, k]``: n units with k figures each.
        statistic: Figure of such an array.
        level: Of the interval, between 0 and 1.
        resamples: Samples of n units drawn with replacement.
        seed: Of the drawing.

    Raises:
        ValueError: If the sample is empty, or ``level`` or ``resamples`` makes no sense.
    """
    units = np.asarray(sample, dtype=np.float64)
    if units.ndim not in (1, 2) or len(units) == 0:
        raise ValueError(f"the sample has shape {units.shape}, expected [n] or [n, k] with n of at least 1")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level is {level} and resamples {resamples}, expected 0 < level < 1 and at least 1")
    value = statistic(units)
    if len(units) < 2:
        return Estimate(value, math.nan, math.nan, level, len(units))
    rng = np.random.default_rng(seed)
    drawn = [statistic(units[rng.integers(len(units), size=len(units))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), level, len(units))


def wilson(successes: int, num: int, *, level: float = 0.95) -> Estimate:
    """A share with its score interval, which stays inside 0 to 1 and has a width at both ends.

    Args:
        successes: Units that count.
        num: All units, at least 1.
        level: Of the interval, between 0 and 1.

    Raises:
        ValueError: If the counts or the level make no sense.

    Source:
        Wilson, Probable Inference, 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if not 0 <= successes <= num or num < 1 or not 0 < level < 1:
        raise ValueError(f"{successes} of {num} at level {level}, expected a part of at least 1, and 0 < level < 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / num
    center = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    # At both ends the sums are exact but for rounding, which must not leave the share outside.
    return Estimate(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)), level, num)
