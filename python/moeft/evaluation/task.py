"""A task: items with a request each, and how the answers are graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeft.evaluation.request import Answer, Request

Figures = dict[str, tuple[float, float]]
"""Metric -> numerator and denominator of one item; a metric is the ratio of their sums over all items."""


@dataclass(frozen=True)
class Metric:
    """A ratio of two sums over items, or the perplexity that such a ratio of log-probability to tokens means."""

    name: str
    better: Literal["higher", "lower"] | None = "higher"
    """None where neither is: the number describes, it does not judge."""
    kind: Literal["ratio", "perplexity"] = "ratio"

    def __call__(self, units_n2: NDArray[np.float64]) -> float:
        """The metric of ``[n, 2]`` numerators and denominators; NaN if there is nothing to divide by."""
        return float(self.of_sums(units_n2.sum(axis=0)))

    def of_sums(self, sums_2: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric of sums ``[..., 2]`` of numerators and denominators."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.where(sums_2[..., 1] == 0, np.nan, sums_2[..., 0] / sums_2[..., 1])
            return np.exp(-ratio) if self.kind == "perplexity" else ratio


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    key: str
    """Names it within its task, whatever subset is taken."""
    request: Request
    reference: Any = None
    """What grading needs to know."""


@dataclass(frozen=True)
class Task:
    """Items and their grading.

    ``grade`` sees all answered items at once, because some figures of an item depend on the others, such as phrases
    that documents share.
    """

    name: str
    items: tuple[Item, ...]
    metrics: tuple[Metric, ...]
    grade: Callable[[Sequence[tuple[Item, Answer]]], list[Mapping[str, tuple[float, float]]]]


def share(condition: bool) -> tuple[float, float]:
    """The figure of an item that counts once, for or against."""
    return (float(condition), 1.0)
