"""Tokens per second of the demo's step beside PEFT's ``target_parameters`` on transformers, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from harness import Case, Subject
from moeft.config import SftRecipe
from moeft.data.collate import PaddingCollator, count_tokens
from moeft.training.sft import SFTTrainer, padding_id

BATCHES = 2
ATTENTION, STACKS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]


def case(recipe: SftRecipe, ours: SFTTrainer) -> Case:
    """One step after another on the same batches: our trainer, and transformers' with PEFT in float32 and bfloat16."""
    collate = PaddingCollator(padding_id(ours.processing_class))
    size = ours.args.per_device_train_batch_size
    rows = ours.train_rows.examples
    batches = [collate(rows[i * size : (i + 1) * size]) for i in range(BATCHES)]
    trainers: dict[str, Trainer] = {"moeft, NF4 experts, float32": ours}
    for dtype in ("float32", "bfloat16"):
        trainers[f"PEFT target_parameters on {dtype}"] = peft_trainer(recipe, ours, dtype)
    tokens = sum(count_tokens(batch) for batch in batches)
    return Case(
        f"training step, {size} rows, forward to optimiser",
        "tokens/s",
        {name: Subject(stepper(trainer, batches), tokens) for name, trainer in trainers.items()},
    )


def peft_trainer(recipe: SftRecipe, ours: SFTTrainer, dtype: str) -> Trainer:
    """transformers' trainer with the recipe's adapter, by PEFT, on the unpacked base."""
    assert recipe.merge is not None
    model = AutoModelForCausalLM.from_pretrained(Path(str(recipe.merge.base_model)), dtype=dtype)
    config = LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=ATTENTION, target_parameters=STACKS
    )
    args = TrainingArguments(
        output_dir=ours.args.output_dir,
        learning_rate=ours.args.learning_rate,
        per_device_train_batch_size=ours.args.per_device_train_batch_size,
        report_to="none",
    )
    return Trainer(model=get_peft_model(model, config), args=args)


def stepper(trainer: Trainer, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """A function that trains on each batch once, as ``Trainer`` does between two logs."""
    model = trainer.model.train()
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    optimizer, parameters = trainer.optimizer, [p for p in model.parameters() if p.requires_grad]

    def steps() -> None:
        for batch in batches:
            count = (batch["labels"] != -100).sum()
            trainer.training_step(model, dict(batch), count)
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
            optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()

    return steps
