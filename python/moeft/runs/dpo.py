"""``moeft dpo``: load the policy, take the reference, measure, train on pairs, measure again, save, merge."""

from __future__ import annotations

from collections.abc import Callable

from moeft.config.dpo import DpoRecipe
from moeft.errors import RecipeError
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
from moeft.runs.dpo_trainer import input_files, make_trainer
from moeft.runs.inputs import shared_input_files
from moeft.runs.launch import num_processes
from moeft.runs.tuning import execute


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
    if num_processes() > 1:
        raise RecipeError("moeft dpo trains in one process; start it without a launcher")
    preflight.check(recipe)
    inputs = input_files(recipe) | shared_input_files(recipe)
    seed = int(recipe.training.get("seed", 42))
    with RunFolder.create(recipe.output, "moeft dpo", recipe.resolved(), inputs, seed) as folder:
        context = RunContext(recipe, folder, show)
        if precompute_only:
            with context.stage("load"):
                make_trainer(context)
            folder.pause()
        else:
            execute(context, make_trainer)
    return folder
