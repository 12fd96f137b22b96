"""``moeft run``: a pipeline of stages."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    pipeline: Annotated[Path, typer.Argument(help="Recipe file of a pipeline, YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values to replace, such as output=runs/second."),
    ] = None,
) -> None:
    """Run the stages of a pipeline in order; the same command goes on after an interruption."""
    from moeft.config.pipeline import PipelineRecipe

    loaded = PipelineRecipe.load(pipeline, overrides or ())
    from moeft.runs.pipeline import run

    print(f"Run folder: {run(loaded).path}")
