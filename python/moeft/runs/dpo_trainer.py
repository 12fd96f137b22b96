"""From a recipe to a preference trainer: load the policy with its adapters, encode the pairs, take the reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config.dpo import DpoRecipe
from moeft.runs.adapter import adapted
from moeft.runs.base_model import load_base, load_tokenizer_of
from moeft.runs.context import RunContext
from moeft.runs.training_plan import memory_forecast, plan_training

if TYPE_CHECKING:
    from moeft.data.pairs import EncodedPairs
    from moeft.training.dpo import DPOTrainer
    from moeft.training.dpo_arguments import DPOConfig


def make_trainer(run: RunContext[DpoRecipe], take_reference: bool = True) -> DPOTrainer:
    """Everything that training needs; figures about bytes, pairs and the plan go to the run's.

    Args:
        run: The run.
        take_reference: Whether to take the log-probabilities under the reference.

    Raises:
        MoeftError: If the model, its tokenizer, the adapters or the pairs cannot be used.
    """
    from moeft.training.dpo import DPOTrainer
    from moeft.training.preference.dataset import check_encoded

    recipe = run.recipe
    args = dpo_arguments(recipe, run.folder.path / "checkpoints")
    tokenizer = load_tokenizer_of(run, recipe.data.chat_template)
    pairs = _read(recipe, recipe.data.train, tokenizer, run)
    heldout = None if recipe.data.eval is None else _read(recipe, (recipe.data.eval,), tokenizer, run)
    model, found = load_base(run)
    check_encoded(pairs, tokenizer, model)
    trainer = DPOTrainer(
        model=_policy(model, pairs, run),
        args=args,
        train_dataset=pairs,
        eval_dataset=heldout,
        processing_class=tokenizer,
        events=run.folder,
        protection=recipe.protection,
    )
    trainer.forecast = memory_forecast(run)
    if take_reference:
        with run.stage("reference"):
            if (report := trainer.prepare_reference()) is not None:
                run.show(str(report))
    _record(run, trainer)
    planned = plan_training(trainer, sum(row.parameters for row in found.rows), trainer.forecast)
    run.metrics["plan"] = planned.to_json()
    run.show(str(planned))
    return trainer


def dpo_arguments(recipe: DpoRecipe, output_dir: Path) -> DPOConfig:
    """Settings of the trainer."""
    from moeft.training.dpo_arguments import DPOConfig

    return DPOConfig(
        output_dir=str(output_dir),
        layout=recipe.data.layout,
        reference_cache=str(recipe.reference.cache or recipe.output / "reference"),
        reference_verify=recipe.reference.verify,
        **recipe.preference.model_dump(),
        **recipe.training,
    )


def input_files(recipe: DpoRecipe) -> dict[str, Path]:
    """Files of pairs and the template; a second start compares them."""
    files = {f"train[{index}]": path for index, path in enumerate(recipe.data.train)}
    others = {"eval": recipe.data.eval, "chat_template": recipe.data.chat_template}
    return files | {name: path for name, path in others.items() if isinstance(path, Path)}


def _policy(model: Any, pairs: EncodedPairs, run: RunContext[DpoRecipe]) -> Any:
    """The model with the adapters below and the one that trains."""
    from moeft.integration import stacking
    from moeft.integration.lora import load_adapter

    recipe = run.recipe
    if recipe.train == "start":
        *below, start = recipe.lora.stack_on
        for index, path in enumerate(below):
            model = load_adapter(model, path, name=f"below_{index}")
        return load_adapter(model, start, trainable=True)
    policy: Any = adapted(model, recipe.lora, pairs.pairs.chosen, run.metrics, run.show)
    if recipe.train == "both":
        stacking.activate(policy, list(policy.active_adapters), trainable=recipe.trained_adapters())
    return policy


def _read(recipe: DpoRecipe, files: tuple[Path, ...], tokenizer: Any, run: RunContext[DpoRecipe]) -> EncodedPairs:
    from moeft.data.pairs import EncodedPairs, encode_pairs
    from moeft.data.preferences import read_preferences

    data = recipe.data
    parts = []
    for path in files:
        rows = read_preferences(path, max_reject_share=data.max_reject_share)
        options: dict[str, Any] = {"reasoning": data.reasoning, "max_length": data.max_length}
        parts.append(encode_pairs(rows, tokenizer, on_too_long=data.on_too_long, **options))
        run.show(f"{path}: {parts[-1]}")
    return EncodedPairs.join(parts)


def _record(run: RunContext[DpoRecipe], trainer: DPOTrainer) -> None:
    """Count pairs into the figures and write ``rejects.jsonl``."""
    from moeft.data.rejects import write_rejects

    found = trainer.train_pairs
    rejects = list(found.rejects)
    counts: dict[str, Any] = {
        "train_pairs": len(found.pairs),
        "rejected_pairs": len(found.rejects),
        "shortened_pairs": found.num_shortened,
        "layout": trainer.layout,
    }
    if trainer.eval_pairs is not None:
        counts["heldout_pairs"] = len(trainer.eval_pairs.pairs)
        rejects += trainer.eval_pairs.rejects
    if trainer.reference is not None:
        counts["reference_cached"] = trainer.reference.cached
        counts["reference_computed"] = trainer.reference.computed
    write_rejects(rejects, run.folder.path / "rejects.jsonl")
    run.metrics["data"] = counts
    if rejects:
        run.show(f"{len(rejects)} rows rejected, reasons in {run.folder.path / 'rejects.jsonl'}")
