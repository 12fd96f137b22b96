"""What would fail late is refused before the run folder is written."""

from __future__ import annotations

import json

from moeft.config import TuningRecipe, validate_optimizer, validate_training_fields
from moeft.config.trainer_values import validate_trainer_values
from moeft.data import templates
from moeft.errors import RecipeError


def check(recipe: TuningRecipe) -> None:
    """Check the parts of a recipe that loading it does not check.

    Raises:
        DataError: If the chat template is neither a name nor a file.
        RecipeError: If ``training`` names an unknown field, policy or optimiser or an absent tracker, or the merge
            would be refused.
    """
    validate_training_fields(recipe.training)
    validate_trainer_values(recipe.training)
    validate_optimizer(recipe.training)
    _check_policy(recipe)
    _check_trackers(recipe)
    if recipe.data.chat_template is not None:
        templates.text_of(recipe.data.chat_template)
    _check_merge(recipe)


def _check_policy(recipe: TuningRecipe) -> None:
    from moeft.training.layer_policies import check_policy_choice

    policy = recipe.training.get("activation_checkpointing")
    try:
        if isinstance(policy, str):
            check_policy_choice(policy)
    except ValueError as error:
        raise RecipeError(f"training.{error}") from error


def _check_trackers(recipe: TuningRecipe) -> None:
    from transformers.integrations import get_available_reporting_integrations

    wanted = recipe.training.get("report_to") or []
    installed = get_available_reporting_integrations()
    for name in wanted if isinstance(wanted, list) else [wanted]:
        if name not in ("none", "all", *installed):
            raise RecipeError(
                f"training.report_to names {name!r}, which is not installed or unknown to transformers; install its "
                f"package, or choose from none, {', '.join(installed) or 'which is all there is'}"
            )


def _check_merge(recipe: TuningRecipe) -> None:
    if recipe.merge is None:
        return
    if recipe.merge.verify and recipe.lora.stack_on:
        raise RecipeError(
            "merge.verify proves the merge of one adapter, and lora.stack_on names others; set merge.verify to false"
        )
    base, output = recipe.merge.base_model or recipe.model, recipe.merge.output
    config = base / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8")):
        raise RecipeError(
            f"an adapter is merged into a 16-bit checkpoint, and {base} is quantised; set merge.base_model to the "
            "checkpoint that it was made from"
        )
    continued = (recipe.output / "run.json").exists()
    if not continued and output.is_dir() and any(output.iterdir()):
        raise RecipeError(f"merge.output {output} is not empty; choose another folder, or remove it")
