"""A task: items with a request each, and how the answers are graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeft.evaluation.request import Answer, Chat, Request

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
    fault: str | None = None
    """Why its answer could not be graded here; it is then not asked, and listed with the items that failed."""


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


def sampled(task: Task, temperature: float, seed: int, max_new_tokens: int | None = None) -> Task:
    """A task whose replies are drawn in another way; requests for log-probabilities stay as they are.

    Args:
        task: The task.
        temperature: 0 for the most probable tokens.
        seed: Of the drawing.
        max_new_tokens: Most tokens of a reply; None keeps the task's own.

    Raises:
        ValueError: If the temperature is negative or the length not positive.
    """
    if temperature < 0 or (max_new_tokens is not None and max_new_tokens < 1):
        raise ValueError(
            f"temperature is {temperature} and max_new_tokens {max_new_tokens}, expected at least 0 and at least 1"
        )

    def changed(request: Request) -> Request:
        if not isinstance(request, Chat):
            return request
        length = request.max_new_tokens if max_new_tokens is None else max_new_tokens
        return replace(request, temperature=temperature, seed=seed, max_new_tokens=length)

    return replace(task, items=tuple(replace(item, request=changed(item.request)) for item in task.items))


def share(condition: bool) -> tuple[float, float]:
    """The figure of an item that counts once, for or against."""
    return (float(condition), 1.0)
