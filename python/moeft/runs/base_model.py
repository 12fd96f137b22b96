"""The model that a run tunes, with its tokenizer and template, and how many bytes its parts take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.errors import CheckpointError
from moeft.runs.context import RunContext

if TYPE_CHECKING:
    from moeft.integration.audit import Audit


def load_base(run: RunContext[Any], chat_template: str | Path | None) -> tuple[Any, Any]:
    """Model and tokenizer of a run's recipe; the bytes of its components go to the run's figures.

    Raises:
        MoeftError: If the model or its tokenizer cannot be used.
    """
    from moeft.data import templates
    from moeft.integration.audit import audit
    from moeft.integration.loading import load
    from moeft.integration.nf4_config import NF4Config

    recipe = run.recipe
    wanted = recipe.quantization
    config = None if wanted is None else NF4Config(**wanted.model_dump())
    model, tokenizer = load(recipe.model, config, recipe.text_only, recipe.dtype)
    if tokenizer is None:
        raise CheckpointError(f"{recipe.model} holds no tokenizer; copy that of the base beside the weights")
    origin = templates.apply(tokenizer, chat_template, model.config.model_type)
    if origin is not None:
        run.show(f"chat template: {origin}")
    packed = getattr(model.config, "quantization_config", None)
    found = audit(model, strict=bool(packed and packed.experts))
    run.show(str(found))
    run.metrics["bytes"] = _bytes_by_component(run, found)
    return model, tokenizer


def _bytes_by_component(run: RunContext[Any], found: Audit) -> dict[str, Any]:
    """Bytes of the checkpoint before and after packing; of the model in memory if it was packed while loading."""
    from moeft.checkpoint import read_report

    report = read_report(run.recipe.model)
    if report is None:
        return {"after": found.bytes_by_component()}
    return {when: report.bytes_by_component(when) for when in ("before", "after")}
