"""What every run that tunes adapters reads, whatever its rows."""

from __future__ import annotations

from pathlib import Path

from moeft.config import TuningRecipe
from moeft.runs.gate import gate_files


def shared_input_files(recipe: TuningRecipe) -> dict[str, Path]:
    """Files and folders but those of the rows, by their place in the recipe; a second start compares them."""
    files = {"model": recipe.model}
    measured = recipe.evaluation
    rows = {"tool_calls": measured.tool_calls, "turn_perplexity": measured.turn_perplexity}
    rows["recall"] = None if measured.recall is None else measured.recall.filler
    files |= {name: path for name, path in rows.items() if path is not None}
    if recipe.gate is not None:
        files |= gate_files(recipe.gate)
    if recipe.protection is not None:
        wanted = {"subspace": recipe.protection.subspace, "layer_importance": recipe.protection.layer_importance}
        files |= {f"protection.{name}": path for name, path in wanted.items() if path is not None}
    return files | {f"stack_on[{i}]": path for i, path in enumerate(recipe.lora.stack_on if recipe.lora else ())}
