"""``moeft dpo``: load the policy, take the reference, measure, train on pairs, measure again, save, merge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moeft.config.dpo import DpoRecipe
from moeft.errors import RecipeError
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
from moeft.runs.dpo_trainer import input_files, make_trainer
from moeft.runs.inputs import shared_input_files
from moeft.runs.launch import num_processes
from moeft.runs.tuning import execute, prepare


def run(recipe: DpoRecipe, show: Callable[[str], None] = print, precompute_only: bool = False) -> RunFolder:
    """Run a recipe, or continue its interrupted run.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.
        precompute_only: Take the log-probabilities under the reference and pause; the next start goes on from there.

    Returns:
        The run folder, as of :func:`moeft.runs.sft.run`, with ``reference/`` unless the recipe names another cache.

    Raises:
        MoeftError: If the recipe, the model, the pairs or the training cannot be used; see the classes.
    """
    _check(recipe)
    with RunFolder.create(recipe.output, *_asked(recipe)) as folder:
        context = RunContext(recipe, folder, show)
        if precompute_only:
            with context.stage("load"):
                make_trainer(context)
            folder.pause()
        else:
            execute(context, make_trainer)
    return folder


def dry_run(recipe: DpoRecipe, show: Callable[[str], None] = print) -> None:
    """Do all of a run that comes before the reference and training, show its plan, and leave nothing.

    Raises:
        MoeftError: As :func:`run` does, but for what only the reference, training and what follows can find.
    """
    _check(recipe)
    RunFolder.check(recipe.output, *_asked(recipe))
    with TemporaryDirectory(prefix="moeft-dry-run-") as scratch:
        elsewhere = recipe.model_copy(update={"output": Path(scratch) / "run"})
        with RunFolder.create(elsewhere.output, "moeft dpo", elsewhere.resolved(), {}) as folder:
            prepare(RunContext(elsewhere, folder, show), partial(make_trainer, take_reference=False))
    show("dry run: no reference was taken and nothing was trained")


def _check(recipe: DpoRecipe) -> None:
    if num_processes() > 1:
        raise RecipeError("moeft dpo trains in one process; start it without a launcher")
    preflight.check(recipe)


def _asked(recipe: DpoRecipe) -> tuple[str, dict[str, Any], dict[str, Path], int]:
    """What a run folder keeps of what was asked for."""
    inputs = input_files(recipe) | shared_input_files(recipe)
    return "moeft dpo", recipe.resolved(), inputs, int(recipe.training.get("seed", 42))
