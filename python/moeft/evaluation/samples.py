"""Several replies to each prompt: asked with seeds of their own, counted as one item each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from moeft.evaluation.measure import TaskResult
from moeft.evaluation.task import Task, sampled


def draws(task: Task, count: int, temperature: float, seed: int, max_new_tokens: int | None = None) -> list[Task]:
    """The same task once for each of the seeds from ``seed`` on.

    Raises:
        ValueError: If several draws would all be the most probable reply, or a setting makes no sense.
    """
    if count > 1 and temperature == 0:
        raise ValueError(f"{count} samples at temperature 0 are all the same reply; set a temperature, such as 0.8")
    if count < 1:
        raise ValueError(f"samples is {count}, expected at least 1")
    return [sampled(task, temperature, seed + draw, max_new_tokens) for draw in range(count)]


def pooled(results: Sequence[TaskResult]) -> TaskResult:
    """One result of all draws of a task.

    Replies to one prompt are no independent units, so the figures of an item are summed over its draws: prompts stay
    the units of intervals and tests. An item that failed in a draw is left out, with the reason.
    """
    first = results[0]
    if len(results) == 1:
        return first
    failed = {key: reason for result in results for key, reason in result.failed.items()}
    figures: dict[str, Mapping[str, tuple[float, float]]] = {
        key: _summed([result.figures[key] for result in results]) for key in first.figures if key not in failed
    }
    requests = {key: _hash(result.requests[key] for result in results) for key in first.requests}
    return TaskResult(first.name, first.metrics, figures, requests, failed, sum(result.empty for result in results))


def _summed(figures: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    names = {name for of_draw in figures for name in of_draw}
    pairs = {name: [of_draw[name] for of_draw in figures if name in of_draw] for name in sorted(names)}
    return {name: (sum(top for top, _ in found), sum(below for _, below in found)) for name, found in pairs.items()}


def _hash(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
