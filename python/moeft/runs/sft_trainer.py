"""From a recipe to a trainer: encode the rows, load the model, look at it, add LoRA, say what training will be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.errors import MoeftError
from moeft.runs.adapter import adapted
from moeft.runs.context import RunContext
from moeft.runs.preview import load_tokenizer
from moeft.runs.sft_data import record_rows, show_example
from moeft.runs.training_plan import plan_training
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
    from moeft import _core
    from moeft.integration.audit import audit
    from moeft.integration.loading import load_model
    from moeft.integration.nf4_config import NF4Config
    from moeft.training.sft import SFTTrainer, check_encoded

    recipe = run.recipe
    args = sft_arguments(recipe, run.folder.path / "checkpoints")
    wanted = recipe.quantization
    config = None if wanted is None else NF4Config(**wanted.model_dump())
    # What may fail goes from quick to slow: headers of all shards, rows, a model that may take minutes to load.
    _core.tensors(str(recipe.model))
    tokenizer, origin = load_tokenizer(recipe.model, recipe.data.chat_template)
    if origin is not None:
        run.show(f"chat template: {origin}")
    rows, composition = training_rows(recipe.data, tokenizer, args, run.show)
    run.metrics["composition"] = composition.to_json()
    heldout = heldout_rows(recipe.data, run.show)
    model = load_model(recipe.model, config, recipe.text_only, recipe.dtype)
    packed = getattr(model.config, "quantization_config", None)
    found = audit(model, strict=bool(packed and packed.experts))
    run.show(str(found))
    run.metrics["bytes"] = _bytes_by_component(run, found)
    check_encoded(rows, tokenizer, model)
    trainer = SFTTrainer(
        model=adapted(model, recipe.lora, rows.examples, run.metrics, run.show),
        args=args,
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
        events=run.folder,
        protection=recipe.protection,
    )
    trainer.forecast = _forecast(run)
    record_rows(run, trainer)
    show_example(run, trainer)
    planned = plan_training(trainer, sum(row.parameters for row in found.rows), trainer.forecast)
    run.metrics["plan"] = planned.to_json()
    run.show(str(planned))
    return trainer


def _forecast(run: RunContext) -> Plan | None:
    """The plan of this run, for the report and for an error about memory."""
    from moeft.planning import plan

    try:
        return plan(run.recipe.model, recipe=run.recipe)
    except MoeftError as error:  # A model that loads and cannot be planned is no reason not to train it.
        run.show(f"no memory plan: {error}")
        return None


def _bytes_by_component(run: RunContext, found: Audit) -> dict[str, Any]:
    """Bytes of the checkpoint before and after packing; of the model in memory if it was packed while loading."""
    from moeft.checkpoint import read_report

    report = read_report(run.recipe.model)
    if report is None:
        return {"after": found.bytes_by_component()}
    return {when: report.bytes_by_component(when) for when in ("before", "after")}
