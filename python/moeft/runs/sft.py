"""``moeft sft``: load, add LoRA, measure, train, measure again, save, merge. Each finished step survives a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moeft.config import SftRecipe
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
from moeft.runs.gate import add_gate
from moeft.runs.held_out import HeldOut
from moeft.runs.merged import check_mergeable, is_merged, merge_adapters, prove_merge
from moeft.runs.sft_data import input_files
from moeft.runs.sft_trainer import make_trainer

if TYPE_CHECKING:
    from moeft.training.sft import SFTTrainer


def run(recipe: SftRecipe, show: Callable[[str], None] = print) -> RunFolder:
    """Run a recipe, or continue its interrupted run.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.

    Returns:
        The finished run folder: ``adapter/``, ``checkpoints/``, ``metrics.json``, ``rejects.jsonl``, ``run.json`` and
        ``events.jsonl``; the merged checkpoint lies where the recipe says.

    Raises:
        MoeftError: If the recipe, the model, the data or the training cannot be used; see the classes.
    """
    preflight.check(recipe)
    seed = int(recipe.training.get("seed", 42))
    with RunFolder.create(recipe.output, "moeft sft", recipe.resolved(), input_files(recipe), seed) as folder:
        _execute(RunContext(recipe, folder, show))
    return folder


def _execute(run: RunContext) -> None:
    held_out = HeldOut(run)
    with run.stage("load"):
        trainer = make_trainer(run)
        wanted = run.recipe.merge
        if wanted is not None and not is_merged(run, wanted):
            check_mergeable(run, trainer, wanted)
    if not held_out.is_measured("before"):
        with run.stage("measure before"):
            held_out.measure(trainer, "before")
    with run.stage("train"):
        _train(run, trainer)
    with run.stage("save adapter"):
        trainer.model.save_pretrained(str(run.folder.path / "adapter"), selected_adapters=["default"])
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


def _train(run: RunContext, trainer: SFTTrainer) -> None:
    from moeft.training.checkpoints import last_checkpoint

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
