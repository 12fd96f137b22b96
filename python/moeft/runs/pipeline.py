"""``moeft run``: stages in order, each resumed where it was, and one report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeft.config.pipeline import PipelineRecipe, Step, steps
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
    planned = [(step, stages.read(step)) for step in steps(recipe)]
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
        folder.write_json(
            "metrics.json", {"trainings": _trainings(done, recipe.output), "comparisons": _comparisons(done)}
        )
    show(f"Report: {write_pipeline_report(folder)}")
    return folder


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
