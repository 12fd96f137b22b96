"""Ask a subject all questions of some tasks, and grade the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeft.errors import DataError
from moeft.evaluation.answers import AnswerCache, answer_key
from moeft.evaluation.request import Answer, Subject, request_json
from moeft.evaluation.statistics import Estimate, bootstrap
from moeft.evaluation.task import Item, Metric, Task

Advance = Callable[[int, int, str], None]
"""Told items done, items in all, and the task."""


@dataclass(frozen=True)
class TaskResult:
    """What a task has found about a subject."""

    name: str
    metrics: tuple[Metric, ...]
    figures: dict[str, Mapping[str, tuple[float, float]]]
    """Item -> metric -> numerator and denominator; items without an answer are not in it."""
    requests: dict[str, str]
    """Item -> hash of what was asked, by which a comparison knows that two runs asked the same."""
    failed: dict[str, str] = field(default_factory=dict)
    """Item -> why it has no answer."""
    empty: int = 0
    """Replies without a character that is not white space."""

    def measured(self) -> list[Metric]:
        """Metrics that at least one item has a figure for."""
        return [metric for metric in self.metrics if any(metric.name in item for item in self.figures.values())]

    def estimate(self, metric: Metric, level: float = 0.95, seed: int = 0) -> Estimate:
        """A metric with its bootstrap interval; its units are items."""
        units = np.array([of_item[metric.name] for of_item in self.figures.values() if metric.name in of_item])
        return bootstrap(units, metric, level=level, seed=seed)


def measure(
    subject: Subject, tasks: Sequence[Task], cache: AnswerCache | None = None, advance: Advance | None = None
) -> list[TaskResult]:
    """Measure a subject on tasks, one after the other.

    Args:
        subject: Who answers.
        tasks: What to ask.
        cache: Where answers are taken from and kept, each as soon as it is there; None for memory.
        advance: Told how far a task is.

    Raises:
        DataError: If a task has no item, or all items of one failed.
    """
    kept = AnswerCache() if cache is None else cache
    return [_measure(subject, task, kept, advance) for task in tasks]


def _measure(subject: Subject, task: Task, cache: AnswerCache, advance: Advance | None) -> TaskResult:
    if not task.items:
        raise DataError(f"task {task.name} has no item, expected at least one")
    answers = _ask(subject, task, cache, advance)
    failed = {item.key: answer["error"] for item, answer in answers if "error" in answer}
    if len(failed) == len(task.items):
        first = next(iter(failed.values()))
        raise DataError(f"task {task.name}: all {len(failed)} items failed, the first with: {first}")
    graded = [(item, answer) for item, answer in answers if "error" not in answer]
    figures = {item.key: figures for (item, _), figures in zip(graded, task.grade(graded), strict=True)}
    # Without the subject: the same question to another model has the same hash.
    requests = {item.key: _key({}, task, item) for item in task.items}
    return TaskResult(task.name, task.metrics, figures, requests, failed, sum(_is_empty(a) for _, a in graded))


def _ask(subject: Subject, task: Task, cache: AnswerCache, advance: Advance | None) -> list[tuple[Item, Answer]]:
    """Items with their answers, from the cache where it has them."""
    keys = [_key(subject.identity, task, item) for item in task.items]
    answers = {index: answer for index, key in enumerate(keys) if (answer := cache.get(key)) is not None}
    answers |= {index: {"error": item.fault} for index, item in enumerate(task.items) if item.fault is not None}
    missing = [index for index in range(len(keys)) if index not in answers]
    for place, answer in subject.answer([task.items[index].request for index in missing]):
        index = missing[place]
        answers[index] = answer
        cache.put(keys[index], task.name, task.items[index], answer)
        if advance is not None:
            advance(len(answers), len(keys), task.name)
    return [(task.items[index], answers[index]) for index in range(len(keys))]


def _key(identity: dict[str, Any], task: Task, item: Item) -> str:
    return answer_key(identity, task.name, item.key, request_json(item.request))


def _is_empty(answer: Answer) -> bool:
    return "reply" in answer and not answer["reply"].strip() and not answer.get("tool_calls")
