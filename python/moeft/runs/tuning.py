"""The order of steps of a run that tunes adapters. Each finished step survives a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.runs.context import RunContext
from moeft.runs.held_out import HeldOut
from moeft.runs.merged import check_mergeable, is_merged, merge_adapters, prove_merge

if TYPE_CHECKING:
    from moeft.training.trainer import MoeTrainer

MakeTrainer = Callable[[RunContext[Any]], "MoeTrainer"]


def prepare(run: RunContext[Any], make_trainer: MakeTrainer) -> tuple[HeldOut, MoeTrainer]:
    """All that comes before training: what is measured, and the trainer; a merge bound to fail is refused."""
    held_out = HeldOut(run)
    with run.stage("load"):
        trainer = make_trainer(run)
        wanted = run.recipe.merge
        if wanted is not None and not is_merged(run, wanted):
            check_mergeable(run, trainer, wanted)
    return held_out, trainer


def execute(run: RunContext[Any], make_trainer: MakeTrainer) -> None:
    """Load, measure, train, save the adapters, measure again, merge, prove."""
    held_out, trainer = prepare(run, make_trainer)
    wanted = run.recipe.merge
    if not held_out.is_measured("before"):
        with run.stage("measure before"):
            held_out.measure(trainer, "before")
    with run.stage("train"):
        _train(run, trainer)
    with run.stage("save adapter"):
        trainer.model.save_pretrained(str(run.folder.path / "adapter"), selected_adapters=run.recipe.trained_adapters())
    with run.stage("measure after"):
        held_out.measure(trainer, "after")
    if wanted is None:
        return
    if not is_merged(run, wanted):
        with run.stage("merge"):
            merge_adapters(run, wanted)
    if wanted.verify:
        with run.stage("prove"):
            prove_merge(run, trainer, held_out, wanted)


def _train(run: RunContext[Any], trainer: MoeTrainer) -> None:
    from moeft.training.checkpoints import last_checkpoint

    last = last_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    throughput = trainer.throughput
    run.metrics["training"] = {
        "steps": trainer.state.global_step,
        "seconds": throughput.total_seconds,
        "tokens": throughput.total_tokens,
        "tokens_per_second": throughput.total_tokens / throughput.total_seconds,
        "peak_bytes": max((log["peak_bytes"] for log in run.folder.events("train_log")), default=0),
        "skipped_steps": trainer.skipped_steps,
        "resumed_from": None if last is None else last.name,
        "routing": None if trainer.routing is None else trainer.routing.summary(),
    }
