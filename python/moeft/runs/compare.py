"""Models beside each other on the same held-out rows: a stage of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeft.config.sft import Evaluation
from moeft.config.stages import CompareRecipe
from moeft.errors import CheckpointError
from moeft.provenance import RunFolder
from moeft.runs.replies import HeldOutCalls

NATS, EXACT = "nats per token", "tool calls exactly right"


def run(recipe: CompareRecipe, out: Path, show: Callable[[str], None] = print) -> RunFolder:
    """Measure every model that an earlier start has not.

    Args:
        recipe: Models and rows.
        out: Run folder; ``metrics.json`` holds ``comparison``: model -> figure -> value.
        show: Where to print.

    Raises:
        MoeftError: If a model or a row cannot be used.
    """
    inputs = {**{f"model {name}": path for name, path in recipe.models.items()}, **_files(recipe)}
    with RunFolder.create(out, "moeft compare", recipe.resolved(), inputs) as folder:
        metrics = folder.read_json("metrics.json") or {"comparison": {}}
        for name, path in recipe.models.items():
            if name not in metrics["comparison"]:
                metrics["comparison"][name] = _measure(recipe, path, show)
                folder.write_json("metrics.json", metrics)
            figures = metrics["comparison"][name].items()
            show(f"{name}: " + ", ".join(f"{figure} {value:.4g}" for figure, value in figures))
    return folder


def _files(recipe: CompareRecipe) -> dict[str, Path]:
    files = {f"rows {name}": path for name, path in recipe.rows.items()}
    return files if recipe.tool_calls is None else {**files, "tool calls": recipe.tool_calls}


def _measure(recipe: CompareRecipe, path: Path, show: Callable[[str], None]) -> dict[str, float]:
    from moeft.data import templates
    from moeft.integration.loading import load

    model, tokenizer = load(path, dtype=recipe.dtype)
    if tokenizer is None:
        raise CheckpointError(f"{path} holds no tokenizer; copy that of the base beside the weights")
    templates.apply(tokenizer, None, model.config.model_type)
    figures = {f"{name}, {NATS}": _nats(model, tokenizer, file, recipe) for name, file in recipe.rows.items()}
    if recipe.tool_calls is not None:
        settings = Evaluation(max_new_tokens=recipe.max_new_tokens, batch_size=recipe.batch_size)
        scores, _ = HeldOutCalls(recipe.tool_calls, settings).score(model, tokenizer)
        figures[EXACT] = scores["exact_match"]
    return figures


def _nats(model: Any, tokenizer: Any, file: Path, recipe: CompareRecipe) -> float:
    """Mean loss over all assistant tokens of a file."""
    from moeft.data.rows import read_rows
    from moeft.evaluation.turn_scores import score_turns

    turns = [
        turn
        for scores in score_turns(model, tokenizer, read_rows(file).rows, batch_size=recipe.batch_size)
        for turn in scores
    ]
    return -sum(turn.log_prob for turn in turns) / max(1, sum(turn.tokens for turn in turns))
