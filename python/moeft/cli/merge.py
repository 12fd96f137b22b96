"""``moeft merge``: merge models or adapters from a recipe."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    recipe: Annotated[Path, typer.Argument(help="Merge recipe, YAML.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
) -> None:
    """Merge models or adapters into a full checkpoint."""
    from moeft.merging import merge as merge_models

    print(merge_models(recipe, out, progress=True))
