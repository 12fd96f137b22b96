"""``h_delta``: how far a model's writing moved from a baseline's, in one number.

Four shares of a text are compared: different words in windows of 50 (MATTR, more is better), trigrams that the text
has had before, trigrams that other replies have too, and words at which a phrase of the slop lists begins (fewer is
better). Each difference is Cohen's ``h = 2 asin(sqrt(p)) - 2 asin(sqrt(q))``, in which a step means as much near 0 as
near 1/2, taken so that better is positive. ``h_delta`` is their mean: 0.2 is small, 0.5 medium and 0.8 large.

Source:
    Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 6.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeft.evaluation.measure import TaskResult
from moeft.evaluation.paired import Difference, paired_change
from moeft.evaluation.task import Metric

H_DELTA = Metric("h_delta")
PARTS = {"mattr": (1, 1.0), "rep3g": (-1, 1.0), "cross_document_trigrams": (-1, 1.0), "slop_per_1k_words": (-1, 1000.0)}
"""Metric of the tasks ``style`` and ``scenes`` -> its sign, and what it is divided by to be a share."""


def h_delta(
    baseline: TaskResult, model: TaskResult, keys: list[str], level: float = 0.95, seed: int = 0
) -> Difference | None:
    """The score of a model against a baseline; None if the results are not those of ``style`` or ``scenes``.

    Args:
        baseline: Results of the baseline.
        model: Of the model.
        keys: Items that both answered; those without a word in either are left out.
        level: Of the interval.
        seed: Of the resampling.
    """
    names = [name for name in PARTS if all(name in {m.name for m in run.metrics} for run in (baseline, model))]
    used = [key for key in keys if all(name in run.figures[key] for run in (baseline, model) for name in names)]
    if not {"mattr", "rep3g"} <= set(names) or not used:
        return None
    signs_k = np.array([PARTS[name][0] for name in names])
    scales_k = np.array([PARTS[name][1] for name in names])

    def change(first_2k: NDArray[np.float64], second_2k: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of sums ``[..., 2 k]``, numerator and denominator of each part beside each other."""
        first_k, second_k = (_angles(sums, scales_k) for sums in (first_2k, second_2k))
        return np.asarray((signs_k * (second_k - first_k)).mean(axis=-1))

    units = [
        np.array([[x for name in names for x in run.figures[key][name]] for key in used]) for run in (baseline, model)
    ]
    moved, p_value = paired_change(units[0], units[1], change, level=level, seed=seed)
    return Difference(0.0, moved.value, moved, p_value)


def _angles(sums_2k: NDArray[np.float64], scales_k: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        # Texts of fewer than three words have no trigram, and so repeat none.
        ratios_k = np.where(sums_2k[..., 1::2] == 0, 0.0, sums_2k[..., ::2] / sums_2k[..., 1::2])
    return 2 * np.arcsin(np.sqrt(np.clip(ratios_k / scales_k, 0, 1)))
