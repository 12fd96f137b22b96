"""``moeft plan``: the memory and speed of training, before anything is loaded."""

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint, 16-bit or packed, or a config.json.")],
    vram: Annotated[str | None, typer.Option("--vram", help="Memory of the card, such as 16GiB.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Recipe of `moeft sft` or `moeft dpo`.")] = None,
    device: Annotated[str | None, typer.Option("--device", help='Card, such as "RTX 3090", to predict speed.')] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs that share the run.")] = 1,
    strategy: Annotated[str, typer.Option("--strategy", help="How they share it: ddp, fsdp or zero3.")] = "ddp",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Forecast memory and speed of training from config and headers; reads no weights."""
    from moeft.planning import plan as forecast

    result = forecast(model, vram, recipe, device, gpus, strategy)
    print(json.dumps(result.to_json(), indent=2) if as_json else result)
