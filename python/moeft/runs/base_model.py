"""The tokenizer and the model of a run's recipe, and how many bytes the model's parts take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.runs.context import RunContext
from moeft.runs.launch import whole_models
from moeft.runs.preview import load_tokenizer

if TYPE_CHECKING:
    from moeft.integration.audit import Audit


def load_tokenizer_of(run: RunContext[Any], chat_template: str | Path | None) -> Any:
    """The tokenizer with the template to train with; a damaged shard answers here, before rows are encoded.

    Raises:
        MoeftError: If a header of the checkpoint or the tokenizer cannot be read.
    """
    from moeft import _core

    _core.tensors(str(run.recipe.model))
    tokenizer, origin = load_tokenizer(run.recipe.model, chat_template)
    if origin is not None:
        run.show(f"chat template: {origin}")
    return tokenizer


def load_base(run: RunContext[Any]) -> tuple[Any, Audit]:
    """The model, and what each of its parts is held in, whose bytes go to the run's figures.

    Raises:
        MoeftError: If the model cannot be used.
    """
    from moeft.integration.audit import audit
    from moeft.integration.loading import load_model
    from moeft.integration.nf4_config import NF4Config

    recipe = run.recipe
    wanted = recipe.quantization
    config = None if wanted is None else NF4Config(**wanted.model_dump())
    with whole_models():
        model = load_model(recipe.model, config, recipe.text_only, recipe.dtype)
    packed = getattr(model.config, "quantization_config", None)
    found = audit(model, strict=bool(packed and packed.experts))
    run.show(str(found))
    run.metrics["bytes"] = _bytes_by_component(run, found)
    return model, found


def _bytes_by_component(run: RunContext[Any], found: Audit) -> dict[str, Any]:
    """Bytes of the checkpoint before and after packing; of the model in memory if it was packed while loading."""
    from moeft.checkpoint import read_report

    report = read_report(run.recipe.model)
    if report is None:
        return {"after": found.bytes_by_component()}
    return {when: report.bytes_by_component(when) for when in ("before", "after")}
