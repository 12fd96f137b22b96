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
) -> None:
    """Train LoRA adapters, or weights of the model, on chat rows, as a recipe says."""
    from moeft.config import SftRecipe

    loaded = SftRecipe.load(recipe, overrides or ())  # Before the slow import: a typo answers at once.
    from moeft.runs.launch import is_main_process
    from moeft.runs.sft import run

    folder = run(loaded).path
    if is_main_process():
        print(f"Run folder: {folder}")
