"""``moeft sft``: supervised fine-tuning from a recipe."""

from pathlib import Path
from typing import Annotated

import typer


def sft(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values to replace, such as training.learning_rate=1e-4."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan: rows, masks, steps, memory, time. Leaves nothing.")
    ] = False,
) -> None:
    """Train LoRA adapters, or weights of the model, on chat rows, as a recipe says."""
    from moeft.config import SftRecipe

    loaded = SftRecipe.load(recipe, overrides or ())  # Before the slow import: a typo answers at once.
    from moeft.runs import sft as runs

    if dry_run:
        runs.dry_run(loaded)
        return
    from moeft.runs.launch import is_main_process
    from moeft.runs.results import show_results

    folder = runs.run(loaded)
    if is_main_process():
        show_results(folder, print)
