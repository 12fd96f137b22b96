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
) -> None:
    """Train LoRA adapters on preference pairs, as a recipe says."""
    from moeft.config.dpo import DpoRecipe

    loaded = DpoRecipe.load(recipe, overrides or ())  # Before the slow import: a typo answers at once.
    from moeft.runs.dpo import run

    print(f"Run folder: {run(loaded, precompute_only=precompute_only).path}")
