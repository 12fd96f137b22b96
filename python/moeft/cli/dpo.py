"""``moeft dpo``: preference tuning from a recipe."""

from pathlib import Path
from typing import Annotated

import typer


def dpo(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values to replace, such as preference.beta=0.05."),
    ] = None,
    precompute_only: Annotated[
        bool, typer.Option(help="Fill the cache of log-probabilities under the reference, and train nothing yet.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan: pairs, steps, memory, time. Leaves nothing.")
    ] = False,
) -> None:
    """Train LoRA adapters on preference pairs, as a recipe says."""
    from moeft.config.dpo import DpoRecipe

    if dry_run and precompute_only:
        raise typer.BadParameter("give --dry-run or --precompute-only, and not both")
    loaded = DpoRecipe.load(recipe, overrides or ())  # Before the slow import: a typo answers at once.
    from moeft.runs import dpo as runs

    if dry_run:
        runs.dry_run(loaded)
        return
    from moeft.runs.results import show_results

    folder = runs.run(loaded, precompute_only=precompute_only)
    if precompute_only:
        print(f"Run folder: {folder.path}")
    else:
        show_results(folder, print)
