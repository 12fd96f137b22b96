"""The order of steps of a run that tunes a model. Each finished step survives a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.runs.context import RunContext
from moeft.runs.gate import add_gate
from moeft.runs.held_out import HeldOut
from moeft.runs.launch import is_main_process
from moeft.runs.learning_rate import settle_rate
from moeft.runs.merged import check_mergeable, is_merged, merge, prove_merge
from moeft.runs.trained import RouterWatch, save_trained

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
    """Load, measure, train, save what trained, measure again, merge, prove."""
    from moeft.training.progress import AtTrainBegin

    held_out, trainer = prepare(run, make_trainer)
    wanted = run.recipe.merge
    routers = RouterWatch(run)

    def measure_before() -> None:
        if not (held_out.is_measured("before") and routers.has_choices(trainer)):
            with run.stage("measure before"):
                held_out.measure(trainer, "before")
                routers.before(trainer)

    if trainer.is_sharded:  # Only training spreads the weights over the processes.
        trainer.add_callback(AtTrainBegin(measure_before))
    else:
        measure_before()
    with run.stage("train"):
        _train(run, trainer)
    with run.stage("save adapter" if run.recipe.lora is not None else "save weights"):
        save_trained(run, trainer)
    with run.stage("measure after"):
        held_out.measure(trainer, "after")
        routers.after(trainer)
    if wanted is None:
        return
    if not is_merged(run, wanted):
        with run.stage("merge"):
            if is_main_process():  # Nobody waits for it: a merge may take longer than a barrier lasts.
                merge(run, trainer, wanted)
    if wanted.verify:
        with run.stage("prove"):
            prove_merge(run, trainer, held_out, wanted)


def _train(run: RunContext[Any], trainer: MoeTrainer) -> None:
    from moeft.training.checkpoints import last_checkpoint

    settle_rate(run, trainer)
    gate = add_gate(run.recipe.gate, trainer, run.folder, run.show)
    last = last_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    throughput = trainer.throughput
    run.metrics["training"] = {
        "steps": trainer.state.global_step,
        "seconds": throughput.total_seconds,
        "tokens": throughput.total_tokens,
        "tokens_per_second": throughput.total_tokens / max(throughput.total_seconds, 1e-9),
        "peak_bytes": max((log["peak_bytes"] for log in run.folder.events("train_log")), default=0),
        "skipped_steps": trainer.skipped_steps,
        "resumed_from": None if last is None else last.name,
        "gate": None if gate is None else gate.summary(),
        "routing": None if trainer.routing is None else trainer.routing.summary(),
    }
