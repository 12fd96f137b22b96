"""The one subclass of ``transformers.Trainer`` that all tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from moeft import families
from moeft.config.optimizer import HOST_STATE_BITS, OWN_OPTIMIZERS, STOCHASTIC
from moeft.config.protection import Protection
from moeft.data.collate import number_of_tokens
from moeft.integration.cpu_linears import multiply_in_core
from moeft.integration.document_masks import mask_documents
from moeft.integration.fused_lora import fuse_lora
from moeft.integration.fused_loss import fuse_loss
from moeft.integration.fused_norms import fuse_norms
from moeft.kernels.linear_cross_entropy import IGNORE_INDEX
from moeft.training import out_of_memory
from moeft.training.arguments import MoeConfig
from moeft.training.diagnosis import Batch, Diagnosis, diagnose
from moeft.training.frozen_base import FrozenBase
from moeft.training.guards import NonFiniteGuard
from moeft.training.layer_policies import LayerPolicies
from moeft.training.length_grouping import SeededLengthGroupedSampler
from moeft.training.missing_gradients import MissingGradients
from moeft.training.optim import HostAdamW, StochasticAdamW, host_options, raise_rate_of_b
from moeft.training.progress import EventLog, EventSink, ProgressBar, Throughput, peak_bytes
from moeft.training.protection import SubspaceProtection
from moeft.training.routing_monitor import RoutingMonitor
from moeft.training.saving import TrainableCheckpoints
from moeft.training.sharding import prepare_fsdp


class MoeTrainer(TrainableCheckpoints):
    """Trainer with guards and measurements; tasks subclass it.

    Args:
        events: Where to record the run; nowhere by default.
        checkpoint_plan: What ``activation_checkpointing: auto`` stands for: the policy of each decoder layer.
        protection: What to leave alone; nothing by default.
        **kwargs: As for ``transformers.Trainer``, without ``compute_metrics``.

    Raises:
        ValueError: If ``compute_metrics`` is given: evaluation keeps no logits. If a plan does not fit the model or
            the arguments. If weights are to be protected and are sharded, or the protection does not fit them or the
            optimiser. If the optimiser is one of moeft's and weights are sharded.
        CheckpointError: If the protection's files do not belong to the model.
    """

    args: MoeConfig
    unit = "rows"
    """What it trains on, in messages."""
    logged_figures: tuple[str, ...] = ()
    """Names of a task's own figures, which the run's events are to hold beside Trainer's."""

    def __init__(
        self,
        *,
        events: EventSink | None = None,
        checkpoint_plan: Sequence[str] | None = None,
        protection: Protection | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics needs logits, which are never kept; call moeft.evaluation on the model")
        super().__init__(**kwargs)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        multiply_in_core(base)
        _mask_padding(base)
        self.loss_is_fused = fuse_loss(base)
        sharded = self.is_sharded
        if not sharded:  # else the modules of the factors must be called, which gathers them
            fuse_lora(base)
        if self.args.fuses_norms:
            fuse_norms(base)
        self.model_accepts_loss_kwargs: bool = self.model_accepts_loss_kwargs or self.loss_is_fused
        self.throughput = Throughput()
        self._operations_per_token: int | None = None
        self.add_callback(self.throughput)
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, self.model)
        if sharded and self.args.optim in OWN_OPTIMIZERS:
            raise ValueError(
                f"optim {self.args.optim!r} steps on whole weights, which FSDP and DeepSpeed shard; take adamw_torch: "
                "both keep float32 masters of weights that train in bfloat16"
            )
        self.add_callback(MissingGradients(self.is_deepspeed_enabled))
        # A second look by one process alone would wait for the others' shards.
        self.guard = NonFiniteGuard(self.args.max_skipped_steps, self._on_skip, None if sharded else self._diagnose)
        self.add_callback(self.guard)
        self.protection: SubspaceProtection | None = None
        if protection is not None:
            if sharded:
                raise ValueError("protection needs whole weights; train without DeepSpeed and FSDP, or without it")
            self.protection = SubspaceProtection(self.model, protection, events)
            self.protection.check_optimizer(self.args, self.optimizer)
            self.add_callback(self.protection)  # after the guard drops bad gradients
        self.events = events
        self.forecast: out_of_memory.Forecast | None = None
        self.routing = RoutingMonitor(self.model) if self.args.log_routing else None
        if self.routing is not None:
            self.add_callback(self.routing)
        if events is not None:
            self.add_callback(EventLog(events, self.logged_figures))
        if self.args.check_frozen_base:
            self.add_callback(FrozenBase(events))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar())
        self.remove_callback(PrinterCallback)
        keeping = LayerPolicies(self.model, self.args, checkpoint_plan)
        keeping.apply()
        self.add_callback(keeping)
        if self.args.gradient_checkpointing and hasattr(self.model, "enable_input_require_grads"):
            # Reentrant checkpointing drops the gradient of a segment whose inputs require none.
            self.model.enable_input_require_grads()

    @property
    def skipped_steps(self) -> int:
        """Optimiser steps that were skipped because of a non-finite loss or gradient."""
        return self.guard.skipped_steps

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: MoeConfig, model: Any = None) -> tuple[Any, Any]:
        """Class and arguments of the optimiser that ``args.optim`` names."""
        if args.optim not in OWN_OPTIMIZERS:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        if args.optim == STOCHASTIC:
            return StochasticAdamW, options | {"seed": args.seed}
        return HostAdamW, options | {"state_bits": HOST_STATE_BITS[args.optim]} | host_options(args.optim_args)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser of ``args.optim``, with a higher rate for B factors if ``args`` ask for it."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.loraplus_lr_ratio is not None:
            raise_rate_of_b(optimizer, self.model if model is None else model, self.args.loraplus_lr_ratio)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return self._length_grouped(rows_per_step, self.train_dataset if train_dataset is None else train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._length_grouped(self.args.eval_batch_size, eval_dataset)

    def _length_grouped(self, batch_size: int, dataset: Any) -> SeededLengthGroupedSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthGroupedSampler(batch_size, dataset, seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks at the step count, and at what callbacks want, after a step only: it would train one more on a
        # resume of a run that is complete or was stopped.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @contextmanager
    def explained_memory(self) -> Iterator[None]:
        """Say which part of the memory is large, and what makes it smaller, if it runs out meanwhile.

        Raises:
            TrainingError: In place of the error of the allocator.
        """
        try:
            yield
        except RuntimeError as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            step = self.state.global_step + 1
            raise out_of_memory.explain(error, self.model, self.optimizer, step, self.forecast) from error

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; the loss for the log, the last finite one instead of any other."""
        self.throughput.add(number_of_tokens(inputs))
        if self.routing is not None:
            self.routing.see_mask(inputs.get("attention_mask"))
        with self.explained_memory():
            loss = super().training_step(model, inputs, num_items_in_batch)
        return self.guard.see_loss(loss, inputs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        # Trainer would list the parameters of the whole model for each step.
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.guard.settle(self.state)  # whatever is written next is to tell of this step too
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a micro-batch; Trainer would count the parameters again for each."""
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        if not tokens:
            return super().floating_point_ops(inputs)
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // tokens
        return self._operations_per_token * tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log Trainer's figures with throughput and peak memory."""
        if "loss" in logs:
            logs |= {"tokens_per_second": self.throughput.read(), "peak_bytes": peak_bytes()}
            logs |= {} if self.routing is None else self.routing.read()
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
                inputs = self._prepare_inputs(self._without_repeats(inputs))
                loss = model(**inputs, **({"num_items_in_batch": 1} if self.loss_is_fused else {})).loss
                tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
                total += (loss.double() * (1 if self.loss_is_fused else tokens)).where(tokens > 0, 0.0)
                count += tokens
                rows += (inputs["labels"] != IGNORE_INDEX).any(1).sum()
        total, count, rows = self.accelerator.reduce(torch.stack((total, count, rows)), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(rows))

    def tokens_of_epoch(self) -> tuple[int, int]:
        """Tokens that the model reads in an epoch, and how many of them are trained."""
        raise NotImplementedError

    def sample_sequences(self, count: int) -> list[list[int]]:
        """Token ids of a few rows to compare models on."""
        raise NotImplementedError

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch whose rows that only even out the last batches of several processes do not count."""
        left = self.accelerator.gradient_state.remainder
        if self.args.world_size == 1 or left <= 0 or not self.accelerator.gradient_state.end_of_dataloader:
            return inputs
        labels = inputs["labels"].clone()
        labels[max(0, left - self.args.process_index * len(labels)) :] = IGNORE_INDEX
        return inputs | {"labels": labels}

    def _on_skip(self, step: int, reason: str, finding: Diagnosis | None) -> None:
        found = {} if finding is None else asdict(finding)
        if self.events is not None and self.is_world_process_zero():
            self.events.event("skipped_step", step=step, reason=reason, **found)
        self.state.log_history.append({"step": step, "skipped": reason, **found})

    def _diagnose(self, batches: list[Batch], backward: bool) -> Diagnosis:
        def loss_of(batch: Batch) -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(self.model, self._prepare_inputs(dict(batch)))

        with nullcontext() if self.routing is None else self.routing.paused():
            return diagnose(self.model, loss_of, batches, self.train_dataset, backward=backward)


def _mask_padding(base: Any) -> None:
    """Give a text model of a known family masks of ours where it computes on a GPU, which its own would wait for."""
    is_known = any(base.config.model_type in family.model_types for family in families.all_families())
    if is_known and base.config.get_text_config() is base.config:
        mask_documents(base, on_host=False)
