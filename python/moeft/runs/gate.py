"""The capability gate of a recipe: tasks and divergence as readings of the model in training."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.gate import Gate, GateDivergence, GateTask
from moeft.errors import DataError, RecipeError
from moeft.provenance import RunFolder
from moeft.runs.gate_suite import with_suite

if TYPE_CHECKING:
    from moeft.evaluation.divergence import BaseDivergence
    from moeft.evaluation.measure import TaskResult
    from moeft.evaluation.request import Subject
    from moeft.evaluation.task import Task
    from moeft.training.gate import CapabilityGate, Reading
    from moeft.training.trainer import MoeTrainer

DIVERGENCE = "divergence"
REPLY_TOKENS = 48
BATCH_SIZE = 48
"""Replies generated at once: those of a task in one go."""


def gate_files(gate: Gate, section: str = "gate") -> dict[str, Path]:
    """Files that a gate reads, by their place in the recipe.

    Args:
        gate: The gate.
        section: Its name in the recipe.

    Raises:
        DataError: If a task is unknown, or has no file in the gate's folder.
    """
    from moeft.evaluation.tasks import task_file

    files: dict[str, Path] = {}
    for index, watched in enumerate(gate.tasks):
        if (file := task_file(watched.task, watched.path, gate.data)) is not None:
            files[f"{section}.tasks[{index}]"] = file
    if gate.divergence is not None and gate.divergence.path is not None:
        files[f"{section}.divergence"] = gate.divergence.path
    return files


def add_gate(
    gate: Gate | None, trainer: MoeTrainer, folder: RunFolder, show: Callable[[str], None] = print
) -> CapabilityGate | None:
    """Put a gate into a trainer whose model is still the base.

    Args:
        gate: The recipe's section; None adds nothing.
        trainer: Before training, and before a checkpoint is loaded.
        folder: The run's, which gains ``gate/`` and events of the kind ``gate``.
        show: Where to print breaches and cost.

    Raises:
        DataError: If the rows of a task cannot be had or read.
        MissingExtraError: If a task of the suite needs a package that is not installed.
        RecipeError: If a task has no such metric.
        UnsupportedModelError: If the divergence is to be watched and the head is no linear layer.
    """
    if gate is None:
        return None
    from moeft.evaluation.model_subject import ModelSubject
    from moeft.training.gate import Bound, CapabilityGate

    gate = with_suite(gate)
    tasks = [_task(gate, watched) for watched in gate.tasks]
    bounds = {
        _name(task): Bound(watched.limit, watched.change, watched.intervals)
        for task, watched in zip(tasks, gate.tasks, strict=True)
    }
    divergence = None
    began = time.perf_counter()
    if gate.divergence is not None:
        divergence = base_divergence(gate.divergence, trainer, gate.seed)
        bounds[DIVERGENCE] = Bound(gate.divergence.limit)
    # One for all measurements, since it finds out once how the model takes its masks.
    subject = ModelSubject(trainer.model, trainer.processing_class, batch_size=BATCH_SIZE)
    callback = CapabilityGate(
        lambda: _readings(subject, tasks, divergence),
        bounds,
        folder.path / "gate",
        every_steps=gate.every_steps,
        every_epoch=gate.every_epoch,
        action=gate.action,
        budget=gate.budget,
        prepared_seconds=time.perf_counter() - began,
        events=folder,
        show=show,
    )
    # Behind the trainer's own callbacks, which measure the time of a step.
    trainer.add_callback(callback)
    return callback


def _task(gate: Gate, watched: GateTask) -> Task:
    """The task with the one metric that is bounded."""
    from moeft.evaluation.tasks import build_task

    task = build_task(watched.task, watched.path, gate.data, watched.rows, gate.seed)
    known = {metric.name: metric for metric in task.metrics if metric.better is not None}
    if not known:
        raise RecipeError(f"gate.tasks: {task.name} has no metric to bound; none of its figures is better high or low")
    name = watched.metric or next(iter(known))
    if name not in known:
        raise RecipeError(f"gate.tasks: {task.name} has no metric {name!r} to bound; it has {', '.join(known)}")
    return dataclasses.replace(task, metrics=(known[name],))


def base_divergence(section: GateDivergence, trainer: MoeTrainer, seed: int) -> BaseDivergence:
    """Remember the model of a trainer as it is now.

    Args:
        section: What to compare it on.
        trainer: Before training.
        seed: Of the choice of rows.

    Raises:
        DataError: If no row can be used.
    """
    from moeft.data.chat import encode
    from moeft.data.reading import read_rows
    from moeft.evaluation.divergence import BaseDivergence

    rows = read_rows(_own_replies(trainer) if section.path is None else section.path)
    examples = encode(rows, trainer.processing_class, max_length=section.max_length, on_too_long="truncate").examples
    chosen = random.Random(seed).sample(range(len(examples)), min(section.rows, len(examples)))
    return BaseDivergence(trainer.model, [examples[index]["input_ids"].tolist() for index in sorted(chosen)])


def _own_replies(trainer: MoeTrainer) -> list[dict[str, Any]]:
    """What the model answers to general prompts now: where its own text goes, it should still want to go later."""
    from moeft.evaluation import suite
    from moeft.evaluation.generation import generate_replies

    prompts = suite.prompts()
    replies = generate_replies(
        trainer.model,
        trainer.processing_class,
        prompts,
        max_new_tokens=REPLY_TOKENS,
        batch_size=BATCH_SIZE,
    )
    said = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply.strip()]
    if not said:
        raise DataError("the base answers no general prompt; give rows to compare it on: gate.divergence.path")
    return [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]} for p, r in said]


def _readings(subject: Subject, tasks: Sequence[Task], divergence: BaseDivergence | None) -> list[Reading]:
    from moeft.evaluation.measure import measure
    from moeft.evaluation.statistics import Estimate, bootstrap
    from moeft.evaluation.task import Metric
    from moeft.training.gate import Reading

    def reading(name: str, metric: Metric, estimate: Estimate) -> Reading:
        better = metric.better or "higher"
        return Reading(name, estimate.value, estimate.low, estimate.high, estimate.num, better, estimate.is_of_few)

    found = []
    for result in measure(subject, tasks):
        (metric,) = result.metrics
        # Of nothing but empty replies, say, a metric is not a number, which no bound lets pass.
        nothing = Estimate(math.nan, math.nan, math.nan, 0.95, 0)
        found.append(reading(_name(result), metric, result.estimate(metric) if result.measured() else nothing))
    if divergence is not None:
        units = divergence.measure()
        metric = Metric(DIVERGENCE, "lower")
        found.append(reading(DIVERGENCE, metric, bootstrap(units, metric)))
    return found


def _name(task: Task | TaskResult) -> str:
    return f"{task.name} {task.metrics[0].name}"
