"""``moeft sft``: load, choose what trains, measure, train, measure, save, merge. Finished steps survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moeft.config import SftRecipe
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
from moeft.runs.held_out import HeldOut
from moeft.runs.launch import is_main_process, num_processes, shared_run
from moeft.runs.merged import check_mergeable, is_merged, merge, prove_merge
from moeft.runs.sft_data import input_files
from moeft.runs.sft_trainer import make_trainer
from moeft.runs.trained import RouterWatch, save_trained
from moeft.runs.training_rows import sft_arguments

if TYPE_CHECKING:
    from moeft.training.sft import SFTTrainer


def run(recipe: SftRecipe, show: Callable[[str], None] = print) -> RunFolder:
    """Run a recipe, or continue its interrupted run.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.

    Returns:
        The finished run folder: ``adapter/`` or ``trained/`` or both, ``checkpoints/``, ``metrics.json``,
        ``rejects.jsonl``, ``run.json`` and ``events.jsonl``; the merged checkpoint lies where the recipe says.

    Raises:
        MoeftError: If the recipe, the model, the data or the training cannot be used; see the classes.
    """
    preflight.check(recipe)
    seed = int(recipe.training.get("seed", 42))

    def create() -> RunFolder:
        inputs, processes = input_files(recipe), num_processes()
        return RunFolder.create(recipe.output, "moeft sft", recipe.resolved(), inputs, seed, processes)

    if num_processes() > 1:
        _ = sft_arguments(recipe, recipe.output / "checkpoints").device  # sets up the group as the engine wants it
    with shared_run(create, recipe.output) as folder:
        _execute(RunContext(recipe, folder, show if is_main_process() else _silent))
    return folder


def _silent(_: str) -> None:
    """Print nothing, in all processes but the first."""


def _execute(run: RunContext) -> None:
    from moeft.training.progress import AtTrainBegin

    held_out, routers = HeldOut(run), RouterWatch(run)
    with run.stage("load"):
        trainer = make_trainer(run)
        wanted = run.recipe.merge
        if wanted is not None and not is_merged(run, wanted):
            check_mergeable(run, trainer, wanted)

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


def _train(run: RunContext, trainer: SFTTrainer) -> None:
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
