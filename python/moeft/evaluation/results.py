"""Results of tasks on disk, and the comparison of two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeft.errors import DataError, RunFolderError
from moeft.evaluation.measure import TaskResult
from moeft.evaluation.paired import Difference, holm, paired_difference
from moeft.evaluation.style_score import H_DELTA, h_delta
from moeft.evaluation.task import Metric
from moeft.provenance import files

FILE = "results.json"


@dataclass(frozen=True)
class Compared:
    """A metric of two runs."""

    task: str
    metric: Metric
    difference: Difference
    p_corrected: float
    """Corrected for all metrics of the comparison."""
    only_one: int
    """Items that one run alone has answered, or that were asked otherwise."""

    def verdict(self, level: float = 0.95) -> str:
        """``better``, ``worse`` or ``different`` if chance explains the difference badly, else ``not told apart``."""
        if self.p_corrected >= 1 - level:
            return "not told apart"
        if self.metric.better is None:
            return "different"
        return "better" if (self.difference.change.value > 0) == (self.metric.better == "higher") else "worse"


def write_results(folder: Path, results: Sequence[TaskResult]) -> Path:
    """Write ``results.json``: metrics with their intervals, and the figures of every item."""
    path = folder / FILE
    files.write_json(path, {"tasks": [_to_json(result) for result in results]})
    return path


def read_results(folder: Path) -> list[TaskResult]:
    """Read what :func:`write_results` wrote.

    Raises:
        RunFolderError: If the folder holds no results, or damaged ones.
    """
    path = folder / FILE
    if not path.is_file():
        raise RunFolderError(f"{folder} holds no {FILE}; give the --out folder of a finished `moeft evaluate`")
    try:
        return [
            TaskResult(
                task["name"],
                tuple(Metric(m["name"], m["better"], m["kind"]) for m in task["metrics"]),
                {key: {name: tuple(pair) for name, pair in item.items()} for key, item in task["figures"].items()},
                task["requests"],
                task["failed"],
                task["empty"],
            )
            for task in files.read_json(path)["tasks"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged or of another version: {type(error).__name__} {error}") from error


def compare(
    first: Sequence[TaskResult], second: Sequence[TaskResult], *, level: float = 0.95, seed: int = 0
) -> list[Compared]:
    """Compare every metric that both runs have, on the items that both answered.

    Args:
        first: Results of one run.
        second: Of the other.
        level: Of intervals, and of what counts as real.
        seed: Of the resampling.

    Raises:
        DataError: If no task has an item in common.
    """
    of_second = {result.name: result for result in second}
    found: list[tuple[str, Metric, Difference, int]] = []
    for a in first:
        b = of_second.get(a.name)
        if b is None:
            continue
        shared = [key for key in a.figures if key in b.figures and a.requests[key] == b.requests[key]]
        only_one = len(a.figures.keys() | b.figures.keys()) - len(shared)
        for metric in a.metrics if shared else ():
            keys = [key for key in shared if metric.name in a.figures[key] and metric.name in b.figures[key]]
            if keys:
                units = [np.array([run.figures[key][metric.name] for key in keys]) for run in (a, b)]
                difference = paired_difference(units[0], units[1], metric, level=level, seed=seed)
                found.append((a.name, metric, difference, only_one))
        if shared and (moved := h_delta(a, b, shared, level, seed)) is not None:
            found.append((a.name, H_DELTA, moved, only_one))
    if not found:
        raise DataError(
            f"the runs have no item in common: tasks {_names(first)} and {_names(second)}; evaluate both on the same "
            "tasks and files, with the same limit and seed"
        )
    corrected = holm([difference.p_value for _, _, difference, _ in found])
    return [
        Compared(task, metric, difference, p, only_one)
        for (task, metric, difference, only_one), p in zip(found, corrected, strict=True)
    ]


def _names(results: Sequence[TaskResult]) -> str:
    return ", ".join(result.name for result in results) or "none"


def _to_json(result: TaskResult) -> dict[str, Any]:
    metrics = []
    for metric in result.measured():
        estimate = result.estimate(metric)
        metrics.append({**asdict(metric), **estimate.to_json(), "is_of_few": estimate.is_of_few})
    return {
        "name": result.name,
        "metrics": metrics,
        "empty": result.empty,
        "failed": result.failed,
        "figures": result.figures,
        "requests": result.requests,
    }
