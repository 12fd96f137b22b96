"""From a recipe to a trainer: encode the rows, load the model, look at it, add LoRA, say what training will be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.config import SftRecipe
from moeft.runs.adapter import adapted
from moeft.runs.base_model import load_base, load_tokenizer_of
from moeft.runs.context import RunContext
from moeft.runs.sft_data import record_rows, show_example
from moeft.runs.streaming import forecast, place_on_gpu, stream_if_asked
from moeft.runs.training_plan import plan_training
from moeft.runs.training_rows import heldout_rows, sft_arguments, training_rows

if TYPE_CHECKING:
    from moeft.training.sft import SFTTrainer


def make_trainer(run: RunContext[SftRecipe]) -> SFTTrainer:
    """Everything that training needs; figures about bytes, rows and the plan go to the run's.

    Raises:
        MoeftError: If the model, its tokenizer, the adapter or the data cannot be used.
    """
    from moeft.integration.trained_roles import train_roles
    from moeft.training.sft import SFTTrainer, check_encoded

    recipe = run.recipe
    args = sft_arguments(recipe, run.folder.path / "checkpoints")
    # What may fail goes from quick to slow: headers of all shards, rows, a model that may take minutes to load.
    tokenizer = load_tokenizer_of(run, recipe.data.chat_template)
    rows, composition = training_rows(recipe.data, tokenizer, args, run.show)
    run.metrics["composition"] = composition.to_json()
    heldout = heldout_rows(recipe.data, run.show)
    model, found = load_base(run)
    check_encoded(rows, tokenizer, model)
    tuned: Any = model
    if recipe.lora is not None:
        tuned = adapted(model, recipe.lora, rows.examples, run.metrics, run.show)
    if recipe.train:
        names = train_roles(tuned, recipe.train)
        run.show(f"trained in full: {len(names)} weights of {', '.join(recipe.train)}")
    planned_memory = forecast(run)
    stream_if_asked(run, tuned, args, planned_memory)
    place_on_gpu(run, tuned, args)
    trainer = SFTTrainer(
        model=tuned,
        args=args,
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
        events=run.folder,
        protection=recipe.protection,
    )
    trainer.forecast = planned_memory
    record_rows(run, trainer)
    show_example(run, trainer)
    planned = plan_training(trainer, sum(row.parameters for row in found.rows), trainer.forecast)
    run.metrics["plan"] = planned.to_json()
    run.show(str(planned))
    return trainer
