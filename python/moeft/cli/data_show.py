"""``moeft data show``: rows as the model will see them, with what is trained."""

from pathlib import Path
from typing import Annotated, Any

import typer


def show(
    file: Annotated[Path, typer.Argument(help="File of rows.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder with tokenizer and config.json; default the recipe's.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 5,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe of `moeft sft`, for its data section.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="Chat template, by name or path.")] = None,
    train_on: Annotated[
        str | None, typer.Option("--train-on", help="assistant, last, completion, messages or all.")
    ] = None,
) -> None:
    """Print rows with the trained tokens in green, or in ⟦brackets⟧ where there is no colour, and what is rejected."""
    from rich.console import Console
    from rich.text import Text

    from moeft.config import SftRecipe
    from moeft.data.preview import Preview
    from moeft.runs.preview import preview

    loaded = None if recipe is None else SftRecipe.load(recipe)
    folder = model or (loaded.model if loaded else None)
    if folder is None:
        raise typer.BadParameter("no tokenizer is named; give --model or --recipe")
    options: dict[str, Any] = {"chat_template": chat_template, "train_on": train_on}
    console = Console(soft_wrap=True, highlight=False)
    has_colour = console.color_system is not None
    for item in preview(file, folder, rows, None if loaded is None else loaded.data, **options):
        if isinstance(item, str):
            console.print(Text(item, "yellow"))
        elif isinstance(item, Preview):
            note = f"; {item.kept}" if item.kept else ""
            console.print(
                Text(f"── line {item.line}: {item.num_tokens} tokens, {item.num_trained} trained{note}", "bold")
            )
            text = Text()
            for run, is_trained in item.runs:
                if is_trained:
                    text.append(run if has_colour else f"⟦{run}⟧", "green")
                else:
                    text.append(run, "dim")
            console.print(text)
        else:
            console.print(Text(f"── line {item.line} is rejected: {item.reason}", "red"))
