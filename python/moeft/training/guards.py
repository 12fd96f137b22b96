"""Skip optimiser steps whose loss or gradient is not finite, and stop when they do not end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from moeft.errors import TrainingError
from moeft.training.diagnosis import Batch, Diagnosis
from moeft.training.processes import local, total

STATE_KEY = "moeft.skipped_steps"


class NonFiniteGuard(TrainerCallback):
    """Counts and skips bad steps.

    ``Trainer`` filters NaN from its logs only: one NaN loss reaches the parameters. Removing every gradient before
    the optimiser runs makes the step a no-op, whatever the optimiser, and leaves its state alone. All processes of a
    run skip a step if one of them has to: its gradients are in everyone's sum.

    The counters travel in the state that Trainer saves with each checkpoint. Trainer's own way to restore a callback
    makes a new one from JSON, without ``on_skip`` and unknown to whoever holds this one.

    Args:
        patience: Stop after this many bad steps in a row.
        on_skip: Called with the step, the reason and what a second look found.
        diagnose: Takes a second look at micro-batches; told whether their loss was fine and a gradient was not.
    """

    def __init__(
        self,
        patience: int,
        on_skip: Callable[[int, str, Diagnosis | None], None] | None = None,
        diagnose: Callable[[list[Batch], bool], Diagnosis] | None = None,
    ) -> None:
        self.patience = patience
        self.on_skip = on_skip
        self.diagnose = diagnose
        self.skipped_steps = 0
        self.in_a_row = 0
        self._seen: list[tuple[Batch, Tensor]] = []
        self._last_finite: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from zero, or from the counters of the checkpoint that is resumed."""
        self.skipped_steps, self.in_a_row = state.stateful_callbacks.get(STATE_KEY, (0, 0))
        self._seen = []
        self._last_finite = None

    def see_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Take note of one micro-batch and its loss; nothing waits for the device.

        Returns:
            The loss for a log's mean: if it is not finite, the last one that was, or 0.
        """
        loss = loss.detach()
        good = torch.isfinite(loss).all()
        self._seen.append((batch, ~good))
        before = torch.zeros_like(loss) if self._last_finite is None else self._last_finite
        self._last_finite = torch.where(good, loss, before)
        return self._last_finite

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop all gradients if the loss or one of them is not finite.

        Raises:
            TrainingError: After ``patience`` bad steps in a row.
        """
        parameters = [p for group in kwargs["optimizer"].param_groups for p in group["params"] if p.grad is not None]
        reason = self._what_is_wrong(parameters, args.device)
        if reason is None and getattr(getattr(kwargs["optimizer"], "optimizer", None), "overflow", False):
            reason = "non-finite gradient"  # DeepSpeed has looked at its shards, and dropped the step by now
        seen, self._seen = self._seen, []
        if reason is None:
            self._count(state, in_a_row=0)
            return
        for parameter in parameters:
            parameter.grad = None
        self.skipped_steps += 1
        self._count(state, self.in_a_row + 1)
        bad_batches = [batch for batch, bad in seen if bool(bad)]
        finding = self.diagnose(bad_batches or [b for b, _ in seen], not bad_batches) if self.diagnose else None
        if self.on_skip is not None:
            self.on_skip(state.global_step + 1, reason, finding)
        if self.in_a_row >= self.patience:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a {reason}, last step {state.global_step + 1}; "
                "lower the learning rate, or look at the rows of these batches"
                + (f": {finding}" if finding is not None else "")
            )

    def _count(self, state: Any, in_a_row: int) -> None:
        self.in_a_row = in_a_row
        state.stateful_callbacks[STATE_KEY] = [self.skipped_steps, in_a_row]

    def _what_is_wrong(self, parameters: list[Tensor], device: torch.device) -> str | None:
        flags = [bad for _, bad in self._seen]
        gradients = [local(p.grad) for p in parameters]
        no = torch.zeros((), dtype=torch.bool, device=device)
        bad_loss = torch.stack(flags).any() if flags else no
        bad_gradient = ~torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all() if gradients else no
        # The one place where a step waits for the device: both are read at once.
        found = torch.stack((bad_loss.to(device), bad_gradient.to(device))).float()
        loss_is_bad, gradient_is_bad = total(found).tolist()
        return "non-finite loss" if loss_is_bad else "non-finite gradient" if gradient_is_bad else None
