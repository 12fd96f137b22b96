"""``moeft sft``: load, add LoRA, measure, train, measure again, save, merge. Each finished step survives a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moeft.config import SftRecipe
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
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
    with RunFolder.create(recipe.output, "moeft sft", recipe.resolved(), input_files(recipe), _seed(recipe)) as folder:
        _execute(RunContext(recipe, folder, show))
    return folder


def dry_run(recipe: SftRecipe, show: Callable[[str], None] = print) -> None:
    """Do all of a run that comes before training, show its plan, and leave nothing but ``data.cache_dir`` behind.

    Raises:
        MoeftError: As :func:`run` does, but for what only training and what follows it can find.
    """
    preflight.check(recipe)
    RunFolder.check(recipe.output, "moeft sft", recipe.resolved(), input_files(recipe), _seed(recipe))
    with TemporaryDirectory(prefix="moeft-dry-run-") as scratch:
        elsewhere = recipe.model_copy(update={"output": Path(scratch) / "run"})
        with RunFolder.create(elsewhere.output, "moeft sft", elsewhere.resolved(), {}, _seed(recipe)) as folder:
            _prepare(RunContext(elsewhere, folder, show))
    show("dry run: nothing was trained")


def _seed(recipe: SftRecipe) -> int:
    return int(recipe.training.get("seed", 42))


def _prepare(run: RunContext) -> tuple[HeldOut, SFTTrainer]:
    held_out = HeldOut(run)
    with run.stage("load"):
        trainer = make_trainer(run)
        wanted = run.recipe.merge
        if wanted is not None and not is_merged(run, wanted):
            check_mergeable(run, trainer, wanted)
    return held_out, trainer


def _execute(run: RunContext) -> None:
    held_out, trainer = _prepare(run)
    wanted = run.recipe.merge
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
