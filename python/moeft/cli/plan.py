"""``moeft plan``: the memory and speed of training, before anything is loaded."""

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, 16-bit or packed, or a config.json.")],
    vram: Annotated[str | None, typer.Option("--vram", help="Memory of the card, such as 16GiB.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Recipe of `moeft sft`.")] = None,
    device: Annotated[str | None, typer.Option("--device", help='Card, such as "RTX 3090", to predict speed.')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Forecast memory and speed of training from config and headers; reads no weights."""
    from moeft.planning import plan as forecast

    result = forecast(model, vram, recipe, device)
    print(json.dumps(result.to_json(), indent=2) if as_json else result)
