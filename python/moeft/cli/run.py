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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage and show the plans of those that could start.")
    ] = False,
) -> None:
    """Run the stages of a pipeline in order; the same command goes on after an interruption."""
    from moeft.config.pipeline import PipelineRecipe

    loaded = PipelineRecipe.load(pipeline, overrides or ())
    from moeft.runs import pipeline as runs

    if dry_run:
        runs.dry_run(loaded)
        return
    print(f"Run folder: {runs.run(loaded).path}")
