"""From a recipe to a trainer: load the model, look at it, add LoRA, encode the rows, forecast the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.errors import CheckpointError, MoeftError
from moeft.runs.adapter import adapted
from moeft.runs.context import RunContext
from moeft.runs.launch import whole_models
from moeft.runs.sft_data import record_rows
from moeft.runs.training_rows import heldout_rows, sft_arguments, training_rows

if TYPE_CHECKING:
    from moeft.integration.audit import Audit
    from moeft.planning import Plan
    from moeft.training.sft import SFTTrainer


def make_trainer(run: RunContext) -> SFTTrainer:
    """Everything that training needs; figures about bytes, rows and the plan go to the run's.

    Raises:
        MoeftError: If the model, its tokenizer, the adapter or the data cannot be used.
    """
    from moeft.data import templates
    from moeft.integration.audit import audit
    from moeft.integration.loading import load
    from moeft.integration.nf4_config import NF4Config
    from moeft.integration.trained_roles import train_roles
    from moeft.training.sft import SFTTrainer

    recipe = run.recipe
    args = sft_arguments(recipe, run.folder.path / "checkpoints")
    wanted = recipe.quantization
    config = None if wanted is None else NF4Config(**wanted.model_dump())
    with whole_models():
        model, tokenizer = load(recipe.model, config, recipe.text_only, recipe.dtype)
    if tokenizer is None:
        raise CheckpointError(f"{recipe.model} holds no tokenizer; copy that of the base beside the weights")
    origin = templates.apply(tokenizer, recipe.data.chat_template, model.config.model_type)
    if origin is not None:
        run.show(f"chat template: {origin}")
    packed = getattr(model.config, "quantization_config", None)
    found = audit(model, strict=bool(packed and packed.experts))
    run.show(str(found))
    run.metrics["bytes"] = _bytes_by_component(run, found)
    rows, composition = training_rows(recipe.data, tokenizer, args, run.show, model)
    run.metrics["composition"] = composition.to_json()
    tuned: Any = model
    if recipe.lora is not None:
        tuned = adapted(model, recipe.lora, rows.examples, run.metrics, run.show)
    if recipe.train:
        names = train_roles(tuned, recipe.train)
        run.show(f"trained in full: {len(names)} weights of {', '.join(recipe.train)}")
    trainer = SFTTrainer(
        model=tuned,
        args=args,
        train_dataset=rows,
        eval_dataset=heldout_rows(recipe.data, run.show),
        processing_class=tokenizer,
        events=run.folder,
        protection=recipe.protection,
    )
    trainer.forecast = _forecast(run)
    record_rows(run, trainer)
    return trainer


def _forecast(run: RunContext) -> Plan | None:
    """The plan of this run, for the report and for an error about memory."""
    from moeft.planning import plan

    try:
        forecast = plan(run.recipe.model, recipe=run.recipe)
    except MoeftError as error:  # A model that loads and cannot be planned is no reason not to train it.
        run.show(f"no memory plan: {error}")
        return None
    run.metrics["plan"] = {
        "peak_allocated_bytes": forecast.peak_allocated_bytes,
        "peak_reserved_bytes": forecast.peak_reserved_bytes,
    }
    return forecast


def _bytes_by_component(run: RunContext, found: Audit) -> dict[str, Any]:
    """Bytes of the checkpoint before and after packing; of the model in memory if it was packed while loading."""
    from moeft.checkpoint import read_report

    report = read_report(run.recipe.model)
    if report is None:
        return {"after": found.bytes_by_component()}
    return {when: report.bytes_by_component(when) for when in ("before", "after")}
