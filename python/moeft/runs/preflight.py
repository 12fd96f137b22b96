"""What would fail late is refused before the run folder is written."""

from __future__ import annotations

import json
from pathlib import Path

from moeft.config import SftRecipe, TuningRecipe, validate_optimizer, validate_training_fields
from moeft.config.learning_rate import is_auto
from moeft.config.optimizer import OWN_OPTIMIZERS, default_optimizer, keeps_masters
from moeft.config.trainer_values import validate_trainer_values
from moeft.data import templates
from moeft.errors import RecipeError
from moeft.planning.sizes import parse_bytes
from moeft.runs.launch import deepspeed_is_bypassed, launched_on_deepspeed, launched_sharded, num_processes


def check(recipe: TuningRecipe) -> None:
    """Check the parts of a recipe that loading it does not check.

    Raises:
        DataError: If the chat template is neither a name nor a file.
        RecipeError: If ``training`` names an unknown field, policy or optimiser or an absent tracker, the optimiser
            would lose updates of weights that train in full or cannot hold what is protected, or the merge would be
            refused.
    """
    validate_training_fields(recipe.training)
    _check_rate(recipe)
    validate_optimizer(recipe.training)
    _check_policy(recipe)
    _check_trackers(recipe)
    if recipe.data.chat_template is not None:
        templates.text_of(recipe.data.chat_template)
    _check_processes(recipe)
    _check_masters(recipe)
    _check_protection(recipe)
    _check_merge(recipe)
    if isinstance(recipe, SftRecipe):
        _check_memory(recipe)


def _check_rate(recipe: TuningRecipe) -> None:
    if not is_auto(recipe.training):
        validate_trainer_values(recipe.training)
        return
    if not isinstance(recipe, SftRecipe):
        raise RecipeError("training.learning_rate is 'auto', which moeft sft alone can find; give a number")
    if num_processes() > 1:
        raise RecipeError(
            "training.learning_rate: auto tries rates in one process; start it in one until it has said the rate, and "
            "give that number"
        )
    validate_trainer_values({name: value for name, value in recipe.training.items() if name != "learning_rate"})


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


def _check_processes(recipe: TuningRecipe) -> None:
    if launched_on_deepspeed(recipe.training):
        _check_deepspeed(recipe)
    measured = ("tool_calls", "turn_perplexity", "recall")
    asked = next((name for name in measured if getattr(recipe.evaluation, name) is not None), None)
    if asked is not None and launched_sharded(recipe.training):
        raise RecipeError(
            f"evaluation.{asked} calls the model outside of training, for which weights must not be sharded; set it to "
            "null and evaluate the finished checkpoint"
        )
    if recipe.gate is not None and num_processes() > 1:
        raise RecipeError(
            "gate measures the model in one process; set it to null, and evaluate the finished checkpoint"
        )
    if recipe.gate is not None and recipe.training.get("load_best_model_at_end"):
        raise RecipeError("training.load_best_model_at_end would undo what the gate rolls back to; set one of them")
    if recipe.merge is not None and recipe.merge.verify and num_processes() > 1:
        raise RecipeError("merge.verify needs the run in one process; set it to false")


def _check_deepspeed(recipe: TuningRecipe) -> None:
    if deepspeed_is_bypassed():
        raise RecipeError(
            "DeepSpeed was asked for, but with ACCELERATE_USE_CPU accelerate starts DDP instead; unset it, and set "
            "training.use_cpu: true"
        )
    if recipe.quantization is not None or _is_quantised(recipe.model):
        raise RecipeError(
            "DeepSpeed shards parameters as numbers, which packed weights are not; set quantization to null and give a "
            "16-bit checkpoint, or take DDP or FSDP 2, which replicate packed weights (docs/distributed.md)"
        )


def _check_masters(recipe: TuningRecipe) -> None:
    if not recipe.trained_roles() or recipe.dtype != "bfloat16" or launched_sharded(recipe.training):
        return
    optimizer = recipe.training.get("optim")
    if optimizer not in (None, *OWN_OPTIMIZERS):
        raise RecipeError(
            f"training.optim is {optimizer!r}, which loses updates below 1/512 of a bfloat16 weight; leave it out or "
            "take adamw_moeft_host or adamw_moeft_8bit (float32 masters in host memory), adamw_moeft_stochastic "
            "(stochastic rounding), or dtype: float32"
        )
    if "master_weights=false" in str(recipe.training.get("optim_args")).replace(" ", "").lower():
        raise RecipeError("training.optim_args: master_weights=false loses updates of bfloat16 weights that train")


def _check_protection(recipe: TuningRecipe) -> None:
    held, training = recipe.protection, recipe.training
    if held is None or held.strength == 0:
        return
    if launched_sharded(training):
        raise RecipeError("protection needs whole weights; train without DeepSpeed and FSDP, or without it")
    dtypes = {recipe.dtype} if recipe.trained_roles() else set()
    dtypes |= set() if recipe.lora is None else {recipe.lora.dtype}
    optimizer = training.get("optim") or default_optimizer(bool(recipe.trained_roles()), recipe.dtype)
    if held.mode == "project" and "bfloat16" in dtypes and not keeps_masters(optimizer, training.get("optim_args")):
        raise RecipeError(
            f"protection.mode is project, but training.optim {optimizer or 'adamw_torch'!r} keeps no float32 masters "
            "of bfloat16 weights, so rounding leads them back into the subspace; take adamw_moeft_host or "
            "adamw_moeft_8bit, float32 weights, or protection.mode: scale_mask"
        )


def _check_merge(recipe: TuningRecipe) -> None:
    if recipe.merge is None:
        return
    if recipe.merge.verify and recipe.trained_roles():
        raise RecipeError("merge.verify proves the merge of an adapter alone, and `train` trains more; set it to false")
    if recipe.merge.verify and recipe.lora is not None and recipe.lora.stack_on:
        raise RecipeError(
            "merge.verify proves the merge of one adapter, and lora.stack_on names others; set merge.verify to false"
        )
    base, output = recipe.merge.base_model or recipe.model, recipe.merge.output
    if _is_quantised(base):
        raise RecipeError(
            f"an adapter is merged into a 16-bit checkpoint, and {base} is quantised; set merge.base_model to the "
            "checkpoint that it was made from"
        )
    continued = (recipe.output / "run.json").exists()
    if not continued and output.is_dir() and any(output.iterdir()):
        raise RecipeError(f"merge.output {output} is not empty; choose another folder, or remove it")


def _is_quantised(checkpoint: Path) -> bool:
    config = checkpoint / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8"))


def _check_memory(recipe: SftRecipe) -> None:
    memory = recipe.memory
    if memory.vram is not None:
        try:
            parse_bytes(memory.vram)
        except ValueError as error:
            raise RecipeError(f"memory.vram: {error}") from error
    if memory.experts == "resident":
        return
    if num_processes() > 1:
        raise RecipeError("memory.experts streams to one GPU; set it to resident, or start the run in one process")
    if "experts" in recipe.trained_roles():
        raise RecipeError("memory.experts streams frozen experts, and `train` names experts; set it to resident")
    made_later = not (recipe.model / "config.json").is_file()  # by an earlier stage of a pipeline
    if memory.backing == "disk" and not made_later and not _is_quantised(recipe.model):
        raise RecipeError(
            f"memory.backing: disk reads experts from the files of a packed checkpoint, and {recipe.model} is none; "
            "make one with `moeft quantize`, or take host"
        )
