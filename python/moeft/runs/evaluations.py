"""Models beside each other on tasks, each difference to the first with its interval: a stage of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeft.config.stages import EvaluateRecipe
from moeft.errors import RecipeError
from moeft.provenance import RunFolder, is_finished
from moeft.runs import evaluate
from moeft.runs.measured import available_device

LEVEL = 0.95


def check(recipe: EvaluateRecipe) -> None:
    """Refuse what would fail once the models are there; rows that an earlier stage makes are left to the run.

    Raises:
        DataError: If rows cannot be used, or a served model cannot answer a task.
        RecipeError: If there is no such task, or a setting cannot be used.
    """
    from moeft.evaluation.request import Chat
    from moeft.evaluation.tasks import TASKS, build_task, task_file

    if recipe.samples > 1 and recipe.temperature == 0:
        raise RecipeError(f"samples is {recipe.samples} at temperature 0, where all replies are the same; set one")
    served = [name for name, model in recipe.models.items() if model.suffix == ".gguf"]
    data = recipe.data if recipe.data is not None and recipe.data.is_dir() else None
    for name, file in recipe.tasks.items():
        if name not in TASKS:
            raise RecipeError(f"there is no task {name!r}; known are {', '.join(TASKS)}")
        rows = task_file(name, file, data)
        if rows is not None and rows.is_file():
            task = build_task(name, rows, data, recipe.limit, recipe.seed, recipe.shots, recipe.tool_protocol)
            if served and not all(isinstance(item.request, Chat) for item in task.items):
                raise RecipeError(
                    f"task {name} wants log-probabilities of texts, which {served[0]}, a GGUF file, cannot give"
                )


def run(recipe: EvaluateRecipe, out: Path, show: Callable[[str], None] = print) -> RunFolder:
    """Evaluate every model that an earlier start has not, and compare each with the first.

    Args:
        recipe: Models and tasks.
        out: Run folder with one of ``moeft evaluate`` for each model; ``metrics.json`` holds ``evaluation``, model ->
            its metrics, and ``differences``, model -> rows of the table.
        show: Where to print.

    Raises:
        MoeftError: If a model, a task or its rows cannot be used; see the classes.
    """
    from moeft.evaluation.results import compare, read_results
    from moeft.evaluation.tasks import task_file

    check(recipe)
    inputs = {f"model {name}": path for name, path in recipe.models.items()}
    rows = {f"rows {name}": task_file(name, path, recipe.data) for name, path in recipe.tasks.items()}
    inputs |= {name: path for name, path in rows.items() if path is not None}
    with RunFolder.create(out, "evaluate models", recipe.resolved(), inputs, recipe.seed) as folder:
        places = {name: folder.path / f"model-{number}" for number, name in enumerate(recipe.models, start=1)}
        for name, place in places.items():
            if not is_finished(place):
                show(f"{name}:")
                settings = _settings(recipe, recipe.models[name])
                evaluate.run(settings, place, recipe.batch_size, available_device(), show=show)
        measured = {name: RunFolder.open(place).read_json("results.json")["tasks"] for name, place in places.items()}
        first, *others = places
        differences = {
            name: evaluate.comparison_rows(
                compare(read_results(places[first]), read_results(places[name]), level=LEVEL), LEVEL
            )
            for name in others
        }
        figures = {name: _figures(tasks) for name, tasks in measured.items()}
        folder.write_json("metrics.json", {"evaluation": figures, "differences": differences})
    return folder


def _settings(recipe: EvaluateRecipe, model: Path) -> evaluate.EvaluateSettings:
    return evaluate.EvaluateSettings(
        model=str(model),
        tasks=tuple(name if file is None else f"{name}={file}" for name, file in recipe.tasks.items()),
        data=recipe.data,
        limit=recipe.limit,
        shots=recipe.shots,
        max_length=recipe.max_length,
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature,
        samples=recipe.samples,
        tool_protocol=recipe.tool_protocol,
        dtype=recipe.dtype,
        seed=recipe.seed,
    )


def _figures(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics with their intervals, without the figures of single items."""
    kept = ("value", "low", "high", "level", "num", "is_of_few")
    return [
        {"task": task["name"], "metric": metric["name"], **{key: metric[key] for key in kept}}
        for task in tasks
        for metric in task["metrics"]
    ]
