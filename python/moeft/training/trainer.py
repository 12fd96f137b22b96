"""The one subclass of ``transformers.Trainer`` that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from moeft.integration.fused_loss import fuse_loss
from moeft.integration.stacking import keeping_active
from moeft.kernels.linear_cross_entropy import IGNORE_INDEX
from moeft.training.guards import NonFiniteGuard
from moeft.training.progress import EventLog, EventSink, ProgressBar, Throughput, peak_bytes


@dataclass
class MoeConfig(TrainingArguments):
    """``TrainingArguments`` with the defaults that adapters on quantised experts want."""

    max_skipped_steps: int = field(
        default=10, metadata={"help": "Stop after this many steps in a row with a non-finite loss or gradient."}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rows are ours and hold no others."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in host memory; only a GPU gains."}
    )
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Loggers besides the run folder."})


class MoeTrainer(Trainer):
    """Trainer with guards and measurements; tasks subclass it.

    Args:
        events: Where to record the run; nowhere by default.
        **kwargs: As for ``transformers.Trainer``, without ``compute_metrics``.

    Raises:
        ValueError: If ``compute_metrics`` is given: evaluation keeps no logits.
    """

    args: MoeConfig

    def __init__(self, *, events: EventSink | None = None, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics needs logits, which are never kept; call moeft.evaluation on the model")
        super().__init__(**kwargs)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.loss_is_fused = fuse_loss(base)
        self.model_accepts_loss_kwargs: bool = self.model_accepts_loss_kwargs or self.loss_is_fused
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        self.guard = NonFiniteGuard(self.args.max_skipped_steps, self._on_skip)
        self.add_callback(self.guard)
        self.events = events
        if events is not None:
            self.add_callback(EventLog(events))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar())
        self.remove_callback(PrinterCallback)
        if self.args.gradient_checkpointing and hasattr(self.model, "enable_input_require_grads"):
            # Reentrant checkpointing drops the gradient of a segment whose inputs require none.
            self.model.enable_input_require_grads()

    @property
    def skipped_steps(self) -> int:
        """Optimiser steps that were skipped because of a non-finite loss or gradient."""
        return self.guard.skipped_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks at the step count after a step only, so it would train one more on a resume of a complete run.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with keeping_active(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch."""
        mask = inputs.get("attention_mask")
        self.throughput.add(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.see_loss(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log Trainer's figures with throughput and peak memory."""
        if "loss" in logs:
            logs |= {"tokens_per_second": self.throughput.read(), "peak_bytes": peak_bytes()}
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss over held-out tokens; Trainer's own is a mean over rows of the means of batches."""
        model = self.model.eval()
        total, count, rows = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        # Under autocast as in training: else a loss before training and one after it would differ in precision.
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                loss = model(**inputs, **({"num_items_in_batch": 1} if self.loss_is_fused else {})).loss
                tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
                total += loss.double() * (1 if self.loss_is_fused else tokens)
                count += tokens
                rows += inputs["labels"].shape[0]
        total, count, rows = self.accelerator.reduce(torch.stack((total, count, rows)), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(rows))

    def _on_skip(self, step: int, reason: str) -> None:
        if self.events is not None:
            self.events.event("skipped_step", step=step, reason=reason)
        self.state.log_history.append({"step": step, "skipped": reason})
