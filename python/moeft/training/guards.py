"""Skip optimiser steps whose loss or gradient is not finite, and stop when they do not end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from moeft.errors import TrainingError
from moeft.training import readback
from moeft.training.diagnosis import Batch, Diagnosis
from moeft.training.optim import reads_found_inf
from moeft.training.processes import local, total

STATE_KEY = "moeft.skipped_steps"


@dataclass(frozen=True)
class _Unread:
    """A step whose verdict is on its way to the host.

    Attributes:
        step: Its number, from 1.
        seen: Its micro-batches, and whether the loss of each was bad.
        optimizer: What took it, or did not.
    """

    step: int
    seen: list[tuple[Batch, Tensor]]
    optimizer: Any


class NonFiniteGuard(TrainerCallback):
    """Counts and skips bad steps.

    ``Trainer`` filters NaN from its logs only: one NaN loss reaches the parameters. Removing every gradient before
    the optimiser runs makes the step a no-op, whatever the optimiser, and leaves its state alone. All processes of a
    run skip a step if one of them has to: its gradients are in everyone's sum.

    To remove gradients the host has to know. On a GPU it would wait for all that it launched, so an optimiser that
    reads the verdict on the device (:func:`reads_found_inf`) gets it there, as ``found_inf``, and the host learns of it
    before the next step: it counts, reports and stops then, with weights that are those of the bad step still. Whoever
    needs the counts between two steps calls :meth:`settle`.

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
        self._readback = readback.Readback()
        self._unread: _Unread | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from zero, or from the counters of the checkpoint that is resumed."""
        self.skipped_steps, self.in_a_row = state.stateful_callbacks.get(STATE_KEY, (0, 0))
        self._seen = []
        self._last_finite = None
        self._unread = None

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
        """Void the step if the loss or a gradient is not finite: on the device if the optimiser can, else here.

        Raises:
            TrainingError: After ``patience`` bad steps in a row.
        """
        self.settle(state)
        optimizer, step = kwargs["optimizer"], state.global_step + 1
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found = self._what_is_wrong(parameters, args.device)
        seen, self._seen = self._seen, []
        reader = reads_found_inf(optimizer, found.device) if readback.reads_late(found.device) else None
        if reader is not None:
            reader.found_inf = found.amax()
            self._readback.send(found)
            self._unread = _Unread(step, seen, reader)
            return
        reason = _reason(found.tolist())  # waits for a GPU
        if reason is None and getattr(getattr(optimizer, "optimizer", None), "overflow", False):
            reason = "non-finite gradient"  # DeepSpeed has looked at its shards, and dropped the step by now
        if reason is not None:
            for parameter in parameters:
                parameter.grad = None
        self._judge(state, step, reason, seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the verdict from the optimiser again."""
        if self._unread is not None:
            self._unread.optimizer.found_inf = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the last step."""
        self.settle(state)

    def settle(self, state: Any) -> None:
        """Judge the last step if that is still to be done; afterwards counters and optimiser state are up to date.

        Raises:
            TrainingError: After ``patience`` bad steps in a row.
        """
        unread, self._unread = self._unread, None
        if unread is None:
            return
        reason = _reason(self._readback.read())
        if reason is not None and hasattr(unread.optimizer, "forget_step"):
            unread.optimizer.forget_step()
        self._judge(state, unread.step, reason, unread.seen)

    def _judge(self, state: Any, step: int, reason: str | None, seen: list[tuple[Batch, Tensor]]) -> None:
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        self.skipped_steps += reason is not None
        state.stateful_callbacks[STATE_KEY] = [self.skipped_steps, self.in_a_row]
        if reason is None:
            return
        bad_batches = [batch for batch, bad in seen if bool(bad)]
        finding = self.diagnose(bad_batches or [b for b, _ in seen], not bad_batches) if self.diagnose else None
        if self.on_skip is not None:
            self.on_skip(step, reason, finding)
        if self.in_a_row >= self.patience:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a {reason}, last step {step}; "
                "lower the learning rate, or look at the rows of these batches"
                + (f": {finding}" if finding is not None else "")
            )

    def _what_is_wrong(self, parameters: list[Tensor], device: torch.device) -> Tensor:
        """Whether the loss and whether a gradient is bad in any process, ``[2]`` of 0 and 1, on the device."""
        flags = [bad.to(device) for _, bad in self._seen]
        gradients = [local(p.grad) for p in parameters]
        norms = [norm.to(device) for norm in torch._foreach_norm(gradients)] if gradients else []
        no = torch.zeros((), dtype=torch.bool, device=device)
        bad_loss = torch.stack(flags).any() if flags else no
        bad_gradient = ~torch.isfinite(torch.stack(norms)).all() if norms else no
        return (total(torch.stack((bad_loss, bad_gradient)).float()) > 0).float()


def _reason(found: list[float]) -> str | None:
    loss_is_bad, gradient_is_bad = found
    return "non-finite loss" if loss_is_bad else "non-finite gradient" if gradient_is_bad else None
