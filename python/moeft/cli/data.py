"""``moeft data``: what data sets hold, before anything is trained."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeft.cli.data_show import show

app = typer.Typer(name="data", no_args_is_help=True, help="Look into data sets before training.")


app.command()(show)


@app.command()
def check(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Files of rows, or saved folders.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of `moeft sft` whose sources to read, filter, encode and mix.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Only format to accept; default each row by its keys.")] = None,
    turns: Annotated[str, typer.Option(help="Accepted order of turns: strict, trim or any.")] = "strict",
    rejects: Annotated[Path | None, typer.Option(help="JSON lines file to write the rejected rows to.")] = None,
) -> None:
    """Print formats, counts and rejects by reason; exit 1 if so many rows are rejected that training would stop."""
    if bool(files) == (recipe is not None):
        raise typer.BadParameter("give files, or --recipe, and not both")
    from moeft.data.rejects import write_rejects

    if recipe is not None:
        from moeft.config import SftRecipe

        loaded = SftRecipe.load(recipe)
        from moeft.runs.training_rows import check_recipe

        found = check_recipe(loaded, print)
        if rejects is not None:
            write_rejects(found, rejects)
        return

    from moeft.config.sources import MAX_REJECT_SHARE
    from moeft.data.check import check_file

    checks = []
    for file in files or ():
        checks.append(check_file(file, format, turns))  # type: ignore[arg-type]  # checked by check_file
        print(checks[-1])
    if rejects is not None:
        write_rejects((reject for found in checks for reject in found.rejects), rejects)
    if any(found.reject_share > MAX_REJECT_SHARE for found in checks):
        print(f"moeft: error: more than {MAX_REJECT_SHARE:.0%} of a file is rejected", file=sys.stderr)
        raise typer.Exit(1)
