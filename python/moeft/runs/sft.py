"""``moeft sft``: load, choose what trains, measure, train, measure, save, merge. Finished steps survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from moeft.config import SftRecipe
from moeft.errors import RecipeError
from moeft.provenance import RunFolder
from moeft.runs import preflight
from moeft.runs.context import RunContext
from moeft.runs.launch import is_main_process, num_processes, shared_run
from moeft.runs.sft_data import input_files
from moeft.runs.sft_trainer import make_trainer
from moeft.runs.training_rows import sft_arguments
from moeft.runs.tuning import execute, prepare


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

    def create() -> RunFolder:
        asked = recipe.resolved(), input_files(recipe), _seed(recipe), num_processes()
        return RunFolder.create(recipe.output, "moeft sft", *asked)

    if num_processes() > 1:
        _join_processes(recipe)
    with shared_run(create, recipe.output) as folder:
        execute(RunContext(recipe, folder, show if is_main_process() else _silent), make_trainer)
    return folder


def dry_run(recipe: SftRecipe, show: Callable[[str], None] = print) -> None:
    """Do all of a run that comes before training, show its plan, and leave nothing but ``data.cache_dir`` behind.

    Raises:
        MoeftError: As :func:`run` does, but for what only training and what follows it can find.
        RecipeError: If it was launched in several processes.
    """
    if num_processes() > 1:
        raise RecipeError("--dry-run looks at a run in one process; start it without the launcher")
    preflight.check(recipe)
    RunFolder.check(recipe.output, "moeft sft", recipe.resolved(), input_files(recipe), _seed(recipe))
    with TemporaryDirectory(prefix="moeft-dry-run-") as scratch:
        elsewhere = recipe.model_copy(update={"output": Path(scratch) / "run"})
        with RunFolder.create(elsewhere.output, "moeft sft", elsewhere.resolved(), {}, _seed(recipe)) as folder:
            prepare(RunContext(elsewhere, folder, show), make_trainer)
    show("dry run: nothing was trained")


def _join_processes(recipe: SftRecipe) -> None:
    args = sft_arguments(recipe, recipe.output / "checkpoints")
    _ = args.device  # sets up the group as the engine wants it
    if args.world_size != num_processes():
        raise RecipeError(
            f"{num_processes()} processes were launched and the engine sees {args.world_size}, so that each would read "
            "all rows, as DeepSpeed does on CPUs without training.use_cpu: true (docs/distributed.md)"
        )


def _silent(_: str) -> None:
    """Print nothing, in all processes but the first."""


def _seed(recipe: SftRecipe) -> int:
    return int(recipe.training.get("seed", 42))
