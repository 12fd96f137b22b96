"""What the report of a pipeline says, from what its stages have left in their folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeft.config.pipeline import Step
from moeft.provenance import RunFolder
from moeft.runs import stages

Figures = dict[str, Any]


def gather(done: Sequence[Step], output: Path) -> Figures:
    """Figures of all finished stages, by the section of the report that shows them.

    Args:
        done: The steps, in order.
        output: Run folder of the pipeline, which links in the report start from.

    Returns:
        ``trainings``: a list; ``notes``: step -> lines; ``comparisons``, ``evaluations``, ``preferences`` and
        ``rounds``: stage -> for each seed its figures and ``seed``.
    """
    return {
        "trainings": [_training(step, output) for step in done if step.kind in ("sft", "dpo")],
        "notes": {step.title: said for step in done if (said := stages.notes(step))},
        "comparisons": _by_stage(done, "compare", _comparison),
        "evaluations": _by_stage(done, "evaluate", _metrics),
        "preferences": _by_stage(done, "dpo", _heldout_pairs),
        "rounds": _by_stage(done, "hard-rounds", lambda step: _rounds(step, output)),
    }


def _by_stage(done: Sequence[Step], kind: str, figures: Callable[[Step], Figures | None]) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    for step in done:
        if step.kind == kind and (of_step := figures(step)) is not None:
            found.setdefault(step.name, []).append({"seed": step.seed, **of_step})
    return found


def _metrics(step: Step) -> Figures:
    metrics: Figures = RunFolder.open(step.folder).read_json("metrics.json")
    return metrics


def _training(step: Step, output: Path) -> Figures:
    """What a run, its gate and its routers did."""
    metrics = _metrics(step)
    training, drift = metrics["training"], metrics.get("router_drift") or {}
    return {
        "stage": step.title,
        "report": _link(step.folder / "report.md", output),
        **{key: training[key] for key in ("steps", "seconds", "tokens", "gate")},
        "learning_rate": (metrics.get("learning_rate") or {}).get("rate"),
        "routing": {key: drift[key] for key in ("agreement", "load_shift") if key in drift},
    }


def _comparison(step: Step) -> Figures:
    metrics = _metrics(step)
    rest: Figures = {key: metrics[key] for key in ("intervals", "against_first") if key in metrics}
    return {"models": metrics["comparison"]} | rest


def _heldout_pairs(step: Step) -> Figures | None:
    """Before and after; None for a run without held-out pairs."""
    heldout = _metrics(step).get("heldout")
    return {"heldout": heldout} if heldout else None


def _rounds(step: Step, output: Path) -> Figures:
    return {"picture": _link(step.folder / "rounds.png", output), **_metrics(step)}


def _link(file: Path, output: Path) -> str | None:
    """Path of a file from the report; None if it was not written, as without matplotlib."""
    return file.relative_to(output).as_posix() if file.is_file() else None
