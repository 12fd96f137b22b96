"""Tables of evaluations, as Markdown that reads well in a terminal too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeft.reports.text import number, table

FEW_NOTE = "(!) fewer than 30 items: the interval is not to be trusted."


def results_table(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Metrics of the tasks of a ``results.json``, each with its interval and items."""
    rows = []
    for task in tasks:
        for metric in task["metrics"]:
            few = " (!)" if metric["is_of_few"] else ""
            failed = len(task["failed"]) or None
            rows.append(
                [
                    f"{task['name']} {metric['name']}",
                    metric["value"],
                    _interval(metric["low"], metric["high"]),
                    f"{metric['num']}{few}",
                    failed,
                    task["empty"] or None,
                ]
            )
    level = tasks[0]["metrics"][0]["level"] if tasks and tasks[0]["metrics"] else 0.95
    text = table(["metric", "value", f"{level:.0%} interval", "items", "failed", "empty replies"], rows)
    return text + _note(any(metric["is_of_few"] for task in tasks for metric in task["metrics"]))


def comparison_table(rows: Sequence[Mapping[str, Any]], first: str, second: str, level: float) -> str:
    """Metrics of two runs beside each other, and which differences are real.

    Args:
        rows: ``task``, ``metric``, ``first``, ``second``, ``change``, ``low``, ``high``, ``p``, ``num``, ``verdict``,
            ``is_of_few``, ``only_one``.
        first: Name of the first run.
        second: Name of the second.
        level: Of the intervals.
    """
    lines = [
        [
            f"{row['task']} {row['metric']}",
            row["first"],
            row["second"],
            row["change"],
            _interval(row["low"], row["high"]),
            row["p"],
            f"{row['num']}{' (!)' if row['is_of_few'] else ''}",
            row["verdict"],
        ]
        for row in rows
    ]
    header = ["metric", first, second, "change", f"{level:.0%} interval", "p, corrected", "items", "verdict"]
    text = table(header, lines) + _note(any(row["is_of_few"] for row in rows))
    left_out = {row["task"]: row["only_one"] for row in rows if row["only_one"]}
    for task, count in left_out.items():
        text += f"\n{task}: {number(count)} items that only one run has answered are left out.\n"
    return text


def estimate_text(estimate: Mapping[str, Any]) -> str:
    """A value with its interval and a mark if it is of few items."""
    interval = _interval(estimate["low"], estimate["high"])
    few = " (!)" if estimate["is_of_few"] else ""
    return number(estimate["value"]) + ("" if interval is None else f" ({interval})") + few


def models_section(title: str, found: Mapping[str, Any]) -> str:
    """Metrics of several models beside each other, and of each the difference to the first.

    Args:
        title: Of the section.
        found: ``evaluation``: model -> its metrics with intervals; ``differences``: model -> rows as of
            :func:`comparison_table`.
    """
    models = list(found["evaluation"])
    cells = {model: {(m["task"], m["metric"]): m for m in metrics} for model, metrics in found["evaluation"].items()}
    names = list(dict.fromkeys(key for of_model in cells.values() for key in of_model))
    rows = [[" ".join(key), *(_known(cells[model].get(key)) for model in models)] for key in names]
    level = next(metric["level"] for of_model in cells.values() for metric in of_model.values())
    text = f"## {title}\n\n" + table(["metric", *models], rows) + f"\nIn brackets: {level:.0%} intervals.\n"
    for model, differences in found["differences"].items():
        text += f"\n### {model} beside {models[0]}\n\n" + comparison_table(differences, models[0], model, level)
    return text


def _known(metric: Mapping[str, Any] | None) -> str | None:
    return None if metric is None else estimate_text(metric)


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{number(low)} to {number(high)}"


def _note(any_few: bool) -> str:
    return f"\n{FEW_NOTE}\n" if any_few else ""
