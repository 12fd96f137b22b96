"""Models beside each other on the same held-out rows and tasks: a stage of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.sft import Evaluation
from moeft.config.stages import CompareRecipe
from moeft.provenance import RunFolder
from moeft.runs.evaluate import comparison_rows
from moeft.runs.measured import available_device, load
from moeft.runs.replies import HeldOutCalls

if TYPE_CHECKING:
    from moeft.evaluation.measure import TaskResult
    from moeft.evaluation.task import Task

NATS, EXACT = "nats per token", "exactly right"
MODELS = "models"


def run(recipe: CompareRecipe, out: Path, show: Callable[[str], None] = print) -> RunFolder:
    """Measure every model that an earlier start has not, and compare each with the first one.

    Args:
        recipe: Models, rows and tasks.
        out: Run folder; ``metrics.json`` holds ``comparison``: model -> figure -> value, ``intervals``: the same with
            bounds and items, and ``against_first``: model -> what differs, item by item, from the first model.
        show: Where to print.

    Raises:
        MoeftError: If a model, a row or a task cannot be used.
    """
    from moeft.evaluation.results import compare, read_results, write_results

    tasks = _tasks(recipe)  # Before a model is loaded: a typo answers at once.
    inputs = {**{f"model {name}": path for name, path in recipe.models.items()}, **_files(recipe)}
    with RunFolder.create(out, "moeft compare", recipe.resolved(), inputs) as folder:
        metrics = folder.read_json("metrics.json") or {"comparison": {}, "intervals": {}, "against_first": {}}
        first: list[TaskResult] = []
        for number, (name, path) in enumerate(recipe.models.items()):
            kept = folder.path / MODELS / str(number)
            if name not in metrics["comparison"]:
                kept.mkdir(parents=True, exist_ok=True)
                write_results(kept, _measure(recipe, path, tasks, show))
            results = read_results(kept)
            first = first or results
            metrics["comparison"][name], metrics["intervals"][name] = _figures(results)
            if results is not first:
                metrics["against_first"][name] = comparison_rows(compare(first, results))
            folder.write_json("metrics.json", metrics)
            figures = metrics["comparison"][name].items()
            show(f"{name}: " + ", ".join(f"{figure} {value:.4g}" for figure, value in figures))
    return folder


def _tasks(recipe: CompareRecipe) -> list[Task]:
    from moeft.evaluation.tasks import build_task

    return [build_task(task.task, task.path, recipe.data, task.rows, recipe.seed) for task in recipe.tasks]


def _files(recipe: CompareRecipe) -> dict[str, Path]:
    from moeft.evaluation.tasks import task_file

    files = {f"rows {name}": path for name, path in recipe.rows.items()}
    for task in recipe.tasks:
        if (file := task_file(task.task, task.path, recipe.data)) is not None:
            files[f"task {task.task}"] = file
    return files if recipe.tool_calls is None else {**files, "tool calls": recipe.tool_calls}


def _measure(recipe: CompareRecipe, path: Path, tasks: Sequence[Task], show: Callable[[str], None]) -> list[TaskResult]:
    from moeft.evaluation.measure import measure
    from moeft.evaluation.model_subject import ModelSubject

    model, tokenizer = load(path, recipe.dtype, available_device(), show)
    found = [_rows(name, model, tokenizer, file, recipe) for name, file in recipe.rows.items()]
    if recipe.tool_calls is not None:
        found.append(_calls(model, tokenizer, recipe.tool_calls, recipe))
    return found + measure(ModelSubject(model, tokenizer, batch_size=recipe.batch_size), tasks)


def _rows(name: str, model: Any, tokenizer: Any, file: Path, recipe: CompareRecipe) -> TaskResult:
    """Mean loss over all assistant tokens of a file; its items are rows."""
    from moeft.data.reading import read_rows
    from moeft.evaluation.task import Metric
    from moeft.evaluation.turn_scores import score_turns

    rows = read_rows(file).rows
    scores = score_turns(model, tokenizer, rows, batch_size=recipe.batch_size)
    items = {
        str(row.line): (-sum(turn.log_prob for turn in turns), float(sum(turn.tokens for turn in turns)))
        for row, turns in zip(rows, scores, strict=True)
    }
    return _result(name, Metric(NATS, "lower"), items)


def _calls(model: Any, tokenizer: Any, file: Path, recipe: CompareRecipe) -> TaskResult:
    """Share of replies that are the right tool call; its items are requests."""
    from moeft.evaluation.task import Metric, share
    from moeft.tool_protocols.bracket import exact_match

    calls = HeldOutCalls(file, Evaluation(max_new_tokens=recipe.max_new_tokens, batch_size=recipe.batch_size))
    replies = calls.replies(model, tokenizer)
    right = (exact_match(reply, wanted) for reply, wanted in zip(replies, calls.references, strict=True))
    return _result("tool calls", Metric(EXACT), {str(n): share(is_right) for n, is_right in enumerate(right, start=1)})


def _result(name: str, metric: Any, items: dict[str, tuple[float, float]]) -> TaskResult:
    from moeft.evaluation.measure import TaskResult

    # All models of a stage are asked the same rows.
    return TaskResult(
        name, (metric,), {key: {metric.name: figures} for key, figures in items.items()}, dict.fromkeys(items, "")
    )


def _figures(results: Sequence[TaskResult]) -> tuple[dict[str, float], dict[str, Any]]:
    """Values, and what goes with them, by figure."""
    values: dict[str, float] = {}
    intervals: dict[str, Any] = {}
    for result in results:
        for metric in result.measured():
            estimate = result.estimate(metric)
            values[f"{result.name}, {metric.name}"] = estimate.value
            intervals[f"{result.name}, {metric.name}"] = {**estimate.to_json(), "is_of_few": estimate.is_of_few}
    return values, intervals
