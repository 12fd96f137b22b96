"""Whether two runs differ on the items that both answered.

Source:
    Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005, section 3.7: the paired permutation test;
    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if first_n2.shape != second_n2.shape:
        raise ValueError(
            f"the runs have shapes {first_n2.shape} and {second_n2.shape}, expected the same items in both"
        )
    both_n4 = np.concatenate([first_n2, second_n2], axis=1)
    change = bootstrap(both_n4, lambda units: metric(units[:, 2:]) - metric(units[:, :2]), level=level, seed=seed)
    p_value = _permutation_test(first_n2, second_n2, metric, abs(change.value), seed)
    return Difference(metric(first_n2), metric(second_n2), change, p_value)


def _permutation_test(
    first_n2: NDArray[np.float64], second_n2: NDArray[np.float64], metric: Metric, observed: float, seed: int
) -> float:
    # Items that both runs answered alike stay alike however they are swapped.
    differ_n = (first_n2 != second_n2).any(axis=1)
    delta_d2 = (second_n2 - first_n2)[differ_n]
    if not len(delta_d2):
        return 1.0
    rng = np.random.default_rng(seed)
    as_large = 0
    for start in range(0, PERMUTATIONS, CHUNK):
        swapped_pd = rng.random((min(CHUNK, PERMUTATIONS - start), len(delta_d2))) < 0.5
        moved_p2 = swapped_pd @ delta_d2
        differences_p = metric.of_sums(second_n2.sum(0) - moved_p2) - metric.of_sums(first_n2.sum(0) + moved_p2)
        # Sums in another order must not make an equal difference look smaller.
        as_large += int((np.abs(differences_p) >= observed * (1 - 1e-9)).sum())
    # The arrangement that was observed is one of those that were possible.
    return (as_large + 1) / (PERMUTATIONS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the same order: below 0.05 are those that are real together."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
