"""``moeft sft``: load, add LoRA, measure, train, measure again, save, merge. Each finished step survives a restart."""

from __future__ import annotations

from collections.abc import Callable

from moeft.config import SftRecipe
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
from moeft.runs.sft_data import input_files
from moeft.runs.sft_trainer import make_trainer
from moeft.runs.tuning import execute


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
        execute(RunContext(recipe, folder, show), make_trainer)
    return folder
