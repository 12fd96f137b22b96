"""Whether two runs differ on the items that both answered.

Source:
    Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005, section 3.7: the paired permutation test;
    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeft.evaluation.statistics import Estimate, bootstrap
from moeft.evaluation.task import Metric

PERMUTATIONS = 9999
CHUNK = 1000


@dataclass(frozen=True)
class Difference:
    """Of one metric, second run less first."""

    first: float
    second: float
    change: Estimate
    """With a bootstrap interval; its units are the items that both runs answered."""
    p_value: float
    """Probability of a difference this large, either way, if it did not matter which run answered an item."""


def paired_difference(
    first_n2: NDArray[np.float64],
    second_n2: NDArray[np.float64],
    metric: Metric,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare a metric of the same items under two runs.

    Args:
        first_n2: ``[n, 2]`` numerator and denominator of each item in the first run.
        second_n2: Those in the second run, in the same order.
        metric: What is made of their sums.
        level: Of the interval.
        seed: Of the resampling.

    Raises:
        ValueError: If the shapes differ, or there is no item.
    """
    change, p_value = paired_change(
        first_n2, second_n2, lambda a, b: metric.of_sums(b) - metric.of_sums(a), level=level, seed=seed
    )
    return Difference(metric(first_n2), metric(second_n2), change, p_value)


def paired_change(
    first_nc: NDArray[np.float64],
    second_nc: NDArray[np.float64],
    change: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Estimate, float]:
    """A change between two runs with its bootstrap interval, and the p-value of the paired permutation test.

    Args:
        first_nc: ``[n, c]`` columns of each item in the first run.
        second_nc: Those in the second run, in the same order.
        change: Of the sums ``[..., c]`` of both runs, ``[...]``; exchanging the runs turns its sign.
        level: Of the interval.
        seed: Of the resampling.

    Raises:
        ValueError: If the shapes differ, or there is no item.
    """
    if first_nc.shape != second_nc.shape:
        raise ValueError(
            f"the runs have shapes {first_nc.shape} and {second_nc.shape}, expected the same items in both"
        )
    columns = first_nc.shape[1]

    def of_units(units: NDArray[np.float64]) -> float:
        sums = units.sum(axis=0)
        return float(change(sums[:columns], sums[columns:]))

    estimate = bootstrap(np.concatenate([first_nc, second_nc], axis=1), of_units, level=level, seed=seed)
    # Items that both runs answered alike stay alike however they are swapped.
    delta_dc = (second_nc - first_nc)[(first_nc != second_nc).any(axis=1)]
    # A change that is no number, such as that of a rate of nothing, says nothing.
    if not len(delta_dc) or not np.isfinite(estimate.value):
        return estimate, 1.0
    rng = np.random.default_rng(seed)
    as_large = 0
    for start in range(0, PERMUTATIONS, CHUNK):
        swapped_pd = rng.random((min(CHUNK, PERMUTATIONS - start), len(delta_dc))) < 0.5
        moved_pc = swapped_pd @ delta_dc
        changes_p = change(first_nc.sum(0) + moved_pc, second_nc.sum(0) - moved_pc)
        # Sums in another order must not make an equal difference look smaller.
        as_large += int((np.abs(changes_p) >= abs(estimate.value) * (1 - 1e-9)).sum())
    # The arrangement that was observed is one of those that were possible.
    return estimate, (as_large + 1) / (PERMUTATIONS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the same order: below 0.05 are those that are real together."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
