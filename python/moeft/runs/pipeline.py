"""``moeft run``: stages in order, each resumed where it was, and one report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeft.config.pipeline import PipelineRecipe, Step, steps
from moeft.errors import MoeftError, RecipeError
from moeft.provenance import RunFolder
from moeft.reports.pipeline import write_pipeline_report
from moeft.runs import stages
from moeft.runs.pipeline_figures import gather


def run(recipe: PipelineRecipe, show: Callable[[str], None] = print) -> RunFolder:
    """Run a pipeline, or continue its interrupted run.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.

    Returns:
        The finished run folder: a folder per stage, ``seed-N/`` around those that depend on a seed, ``report.md``.

    Raises:
        RecipeError: If a stage cannot be used; before the first one runs.
        MoeftError: What a stage raises; the next start goes on with that stage.
    """
    planned = _planned(recipe)
    with RunFolder.create(recipe.output, "moeft run", recipe.resolved(), _inputs(recipe, planned)) as folder:
        for number, (step, settings) in enumerate(planned, start=1):
            kind = stages.KINDS[step.kind]
            if kind.is_done(step.folder):
                continue
            show(f"[{number}/{len(planned)}] {step.title}: {step.kind}")
            started = time.perf_counter()
            folder.event("stage", name=step.title, status="started", seconds=0.0)
            kind.run(settings, step.folder, show)
            gc.collect()  # The next stage loads models of its own.
            seconds = time.perf_counter() - started
            folder.event("stage", name=step.title, status="finished", seconds=seconds)
        folder.write_json("metrics.json", gather([step for step, _ in planned], recipe.output))
    show(f"Report: {write_pipeline_report(folder)}")
    return folder


def dry_run(recipe: PipelineRecipe, show: Callable[[str], None] = print) -> None:
    """Check every stage, do what comes before training in those whose inputs are there, and leave nothing.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.

    Raises:
        FileNotFoundError: If there is no such input.
        MoeftError: As :func:`run` before its first stage, and what the dry run of a stage raises.
    """
    planned = _planned(recipe)
    for path in _inputs(recipe, planned).values():
        if not path.exists():
            raise FileNotFoundError(2, "is an input of a stage, and is not there", str(path))
    for number, (step, settings) in enumerate(planned, start=1):
        kind = stages.KINDS[step.kind]
        missing = (path for path in stages.inputs(settings) if not path.exists())
        waits = sorted({_writer(planned, path) for path in missing} - {step.name})
        state = "finished" if kind.is_done(step.folder) else f"waits for {', '.join(waits)}" if waits else "ready"
        show(f"[{number}/{len(planned)}] {step.title}: {step.kind}, {state}")
        if state == "ready" and kind.dry_run is not None:
            kind.dry_run(settings, show)
    show("dry run: no stage was run")


def _planned(recipe: PipelineRecipe) -> list[tuple[Step, Any]]:
    """Every step with its recipe, checked as far as it can be before earlier ones have run."""
    planned = [(step, stages.read(step)) for step in steps(recipe)]
    for step, settings in planned:
        kind = stages.KINDS[step.kind]
        if kind.check is not None and not kind.is_done(step.folder):
            try:
                kind.check(settings)
            except MoeftError as error:
                raise RecipeError(f"stages.{step.name}: {error}") from error
    return planned


def _writer(planned: Sequence[tuple[Step, Any]], path: Path) -> str:
    """Name of the stage that writes a path; the path itself if it lies in the folder of none."""
    return next((step.name for step, _ in planned if path.is_relative_to(step.folder)), str(path))


def _inputs(recipe: PipelineRecipe, planned: Sequence[tuple[Step, Any]]) -> dict[str, Path]:
    """What stages read and no stage writes, the files of their recipes included."""
    read = {path for _, settings in planned for path in stages.inputs(settings)}
    read |= {step.file for step, _ in planned if step.file is not None}
    found = sorted({path.absolute() for path in read})
    return {str(path): path for path in found if not path.is_relative_to(recipe.output)}
