"""What the rounds of ``moeft hard iterate`` start from: supervised training, if the recipe asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from moeft.config import SftRecipe
from moeft.config.iterate import IterateRecipe
from moeft.errors import DataError, RecipeError
from moeft.hard.requests import HeldOutTexts
from moeft.provenance import is_finished

Show = Callable[[str], None]


def starting_adapters(recipe: IterateRecipe, folder: Path, held_out: HeldOutTexts, show: Show) -> tuple[Path, ...]:
    """Adapters that rounds start from, lowest first; supervised training comes before, where it is asked for.

    Args:
        recipe: The resolved recipe.
        folder: Where supervised training writes.
        held_out: Requests that must not be trained on.
        show: Where to print what is found.

    Raises:
        RecipeError: If supervised training is of another model, or leaves no adapter.
        DataError: If it would train on a held-out request.
    """
    if recipe.sft is None:
        return recipe.lora.stack_on
    supervised = SftRecipe.load(recipe.sft, [f"output={json.dumps(str(folder))}"])
    if supervised.model != recipe.model or supervised.lora is None or supervised.train:
        raise RecipeError(
            f"sft: {recipe.sft} is to leave an adapter on {recipe.model} and to train nothing else; it tunes "
            f"{supervised.model}" + (f" and trains {', '.join(supervised.train)}" if supervised.train else "")
        )
    if not is_finished(folder):
        _check_rows(supervised, held_out)
        from moeft.runs import sft

        sft.run(supervised, show)
    return tuple(supervised.adapters(folder / "adapter"))


def _check_rows(supervised: SftRecipe, held_out: HeldOutTexts) -> None:
    """Refuse files of supervised training in which a held-out request stands, whatever filters would leave out."""
    from moeft.data.reading import read_rows

    for source in supervised.data.train:
        if source.path is None:
            continue
        for row in read_rows(source.path, format=source.format or supervised.data.format, turns="any").rows:
            if reason := held_out.leak(row.messages):
                raise DataError(
                    f"{source.path} line {row.line} {reason}, on which rounds are measured; remove the row from one of "
                    "the two files"
                )
