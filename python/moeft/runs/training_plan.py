"""What a run is about to do, said before it does it: steps, tokens, weights that train, memory, time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeft.errors import MoeftError
from moeft.planning.sizes import format_bytes

if TYPE_CHECKING:
    from moeft.planning import Plan
    from moeft.runs.context import RunContext
    from moeft.training.dpo import DPOTrainer
    from moeft.training.sft import SFTTrainer
    from moeft.training.trainer import MoeTrainer


@dataclass(frozen=True)
class TrainingPlan:
    """The figures. ``str()`` is a few lines for people."""

    steps: int
    rows_per_step: int
    """Rows, or packs of rows."""
    epochs: float
    tokens: int
    trained_tokens: int
    trainable_parameters: int
    parameters: int
    """Of the base."""
    seconds: float | None
    """Of all steps, from one micro-batch that was timed; None if none was."""
    peak_allocated_bytes: int | None
    """Memory in use on a GPU, as forecast; None if the model cannot be planned."""
    peak_reserved_bytes: int | None
    unit: str = "rows"
    """What a step takes some of."""

    @property
    def trainable_share(self) -> float:
        """Trainable weights by those of the base."""
        return self.trainable_parameters / self.parameters

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return {**asdict(self), "trainable_share": self.trainable_share}

    def __str__(self) -> str:
        time = "not known before the first step" if self.seconds is None else f"about {_duration(self.seconds)}"
        memory = "not known for this model" if self.peak_allocated_bytes is None else self._memory()
        return (
            f"plan: {self.steps} steps of {self.rows_per_step} {self.unit}, {self.epochs:.3g} epochs, about "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained\n"
            f"  weights that train: {self.trainable_parameters:,}, {self.trainable_share:.2%} of the base's "
            f"{self.parameters:,}\n"
            f"  memory on a GPU: {memory}\n"
            f"  time of all steps: {time}"
        )

    def _memory(self) -> str:
        assert self.peak_allocated_bytes is not None
        assert self.peak_reserved_bytes is not None
        in_use, reserved = format_bytes(self.peak_allocated_bytes), format_bytes(self.peak_reserved_bytes)
        return f"peak {in_use} in use, {reserved} with fragmentation, for {self.unit} of data.max_length"


def plan_training(trainer: SFTTrainer | DPOTrainer, base_parameters: int, forecast: Plan | None) -> TrainingPlan:
    """Count steps and tokens, and time a micro-batch.

    Args:
        trainer: One that has not begun to train.
        base_parameters: Weights of the model without adapters.
        forecast: Of its memory.
    """
    from moeft.training.probe import time_micro_batch

    args = trainer.args
    steps = planned_steps(trainer)
    epochs = steps / _steps_per_epoch(trainer)
    tokens_of_epoch, trained_of_epoch = trainer.tokens_of_epoch()
    tokens = round(epochs * tokens_of_epoch)
    timed = time_micro_batch(trainer)
    return TrainingPlan(
        steps=steps,
        rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        epochs=epochs,
        tokens=tokens,
        trained_tokens=round(epochs * trained_of_epoch),
        trainable_parameters=sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        parameters=base_parameters,
        seconds=None if timed is None else timed.seconds / timed.tokens * tokens,
        peak_allocated_bytes=None if forecast is None else forecast.peak_allocated_bytes,
        peak_reserved_bytes=None if forecast is None else forecast.peak_reserved_bytes,
        unit=trainer.unit,
    )


def planned_steps(trainer: MoeTrainer) -> int:
    """Optimiser steps of a trainer that has not begun to train."""
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(trainer))


def _steps_per_epoch(trainer: MoeTrainer) -> int:
    args, rows = trainer.args, trainer.train_dataset
    share = len(rows) / (args.train_batch_size * args.world_size)
    batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
    # As transformers.Trainer counts: what is left of an epoch behind whole steps makes one more.
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def memory_forecast(run: RunContext[Any], vram: str | int | None = None) -> Plan | None:
    """The plan of a run, for its report and for an error about memory; None, said, for a model that has none."""
    from moeft.planning import plan

    try:
        return plan(run.recipe.model, recipe=run.recipe, vram=vram)
    except MoeftError as error:  # A model that loads and cannot be planned is no reason not to train it.
        run.show(f"no memory plan: {error}")
        return None


def _duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
