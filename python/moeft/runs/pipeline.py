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
        done = [step for step, _ in planned]
        metrics = {
            "trainings": _trainings(done, recipe.output),
            "comparisons": _comparisons(done),
            "evaluations": _evaluations(done),
            "notes": _notes(done),
            "preferences": _preferences(done),
            "rounds": _rounds(recipe, done),
        }
        folder.write_json("metrics.json", metrics)
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
        waits = sorted({_stage_of(recipe, path) for path in stages.inputs(settings) if not path.exists()} - {step.name})
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


def _stage_of(recipe: PipelineRecipe, path: Path) -> str:
    """Name of the stage that writes a path."""
    inside = path.relative_to(recipe.output).parts
    return inside[1] if inside[0].startswith("seed-") else inside[0]


def _inputs(recipe: PipelineRecipe, planned: Sequence[tuple[Step, Any]]) -> dict[str, Path]:
    """What stages read and no stage writes."""
    found = sorted({path.absolute() for _, settings in planned for path in stages.inputs(settings)})
    return {str(path): path for path in found if not path.is_relative_to(recipe.output)}


def _comparisons(done: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Stage -> seed, and figures by model."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in done:
        if step.kind == "compare":
            metrics = RunFolder.open(step.folder).read_json("metrics.json")
            rest = {key: metrics[key] for key in ("intervals", "against_first") if key in metrics}
            found.setdefault(step.name, []).append({"seed": step.seed, "models": metrics["comparison"], **rest})
    return found


def _trainings(done: Sequence[Step], output: Path) -> list[dict[str, Any]]:
    """Of each run that trained: what its gate and its routers did."""
    found = []
    for step in done:
        if step.kind == "sft":
            metrics = RunFolder.open(step.folder).read_json("metrics.json")
            training, drift = metrics["training"], metrics.get("router_drift") or {}
            found.append(
                {
                    "stage": step.title,
                    "report": str((step.folder / "report.md").relative_to(output)),
                    "steps": training["steps"],
                    "seconds": training["seconds"],
                    "tokens": training["tokens"],
                    "learning_rate": (metrics.get("learning_rate") or {}).get("rate"),
                    "gate": training["gate"],
                    "routing": {key: drift[key] for key in ("agreement", "load_shift") if key in drift},
                }
            )
    return found


def _evaluations(done: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Stage -> seed, figures by model, and their differences to the first model."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in done:
        if step.kind == "evaluate":
            metrics = RunFolder.open(step.folder).read_json("metrics.json")
            found.setdefault(step.name, []).append({"seed": step.seed, **metrics})
    return found


def _notes(done: Sequence[Step]) -> dict[str, list[str]]:
    """Stage -> what it said about its result."""
    return {step.title: said for step in done if (said := stages.notes(step.kind, step.folder))}


def _preferences(done: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Stage -> seed, and figures of held-out pairs before and after."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in done:
        if step.kind == "dpo" and (heldout := RunFolder.open(step.folder).read_json("metrics.json").get("heldout")):
            found.setdefault(step.name, []).append({"seed": step.seed, "heldout": heldout})
    return found


def _rounds(recipe: PipelineRecipe, done: Sequence[Step]) -> dict[str, list[dict[str, Any]]]:
    """Stage -> seed, and what became of its rounds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in done:
        if step.kind == "hard-rounds":
            metrics = RunFolder.open(step.folder).read_json("metrics.json")
            picture = (step.folder / "rounds.png").relative_to(recipe.output).as_posix()
            found.setdefault(step.name, []).append({"seed": step.seed, "picture": picture, **metrics})
    return found
