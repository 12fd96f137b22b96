"""A learning rate range test: a few steps at each rate, and how far the model has moved from what it was.

Source:
    Smith, Cyclical Learning Rates for Training Neural Networks, https://arxiv.org/abs/1506.01186, section 3.3; here the
    divergence from the base decides, not the loss, and every rate starts from the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeft.training.trainer import MoeTrainer


@dataclass(frozen=True)
class RatePoint:
    """What a few steps at one rate did."""

    rate: float
    divergence: float
    """KL(base || model) behind the last step, nats per token; NaN if a loss was not finite."""
    loss: float
    """Of the last step, before its update."""
    is_within: bool
    """Whether the divergence keeps the bound."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def range_test(
    trainer: MoeTrainer,
    divergence: Callable[[], float],
    rates: Sequence[float],
    *,
    steps: int,
    bound: float,
    seed: int = 0,
) -> list[RatePoint]:
    """Train a few steps at each rate, from the same weights on the same rows, until one breaks the bound.

    Weights, gradients, random states and the trainer's counters are afterwards what they were, bit for bit, and no
    optimiser is left behind. The rate is constant, without warm-up. Of the trainer's callbacks only protection acts: it
    decides how far a rate moves the model.

    Args:
        trainer: In one process, before training.
        divergence: Measures how far the model is from what it was, in nats per token.
        rates: Rates in rising order.
        steps: Optimiser steps at each.
        bound: Largest divergence that is allowed.
        seed: Of the choice of rows, and of dropout.

    Returns:
        A point for every rate that was tried; only the last one may be beyond the bound.

    Raises:
        TrainingError: If the memory does not suffice, with what fills it.
    """
    batches = _batches(trainer, steps, seed)
    points: list[RatePoint] = []
    protection = nullcontext() if trainer.protection is None else trainer.protection.at_hand()
    with _put_back(trainer) as restore, protection:
        for rate in rates:
            torch.manual_seed(seed)
            with trainer.explained_memory():
                loss = _train(trainer, batches, rate)
            moved = divergence() if math.isfinite(loss) else math.nan
            points.append(RatePoint(rate, moved, loss, moved <= bound))
            restore()
            if not points[-1].is_within:
                break
    return points


def _batches(trainer: MoeTrainer, steps: int, seed: int) -> list[list[dict[str, Any]]]:
    """Micro-batches of each step; rows are drawn without repetition as long as there are any."""
    rows: Any = trainer.train_dataset
    size, parts = trainer.args.train_batch_size, trainer.args.gradient_accumulation_steps
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * parts * size:
        order += rng.sample(range(len(rows)), len(rows))
    micro = [order[start : start + size] for start in range(0, steps * parts * size, size)]
    collated = [trainer.data_collator([rows[index] for index in chosen]) for chosen in micro]
    return [collated[start : start + parts] for start in range(0, len(collated), parts)]


def _train(trainer: MoeTrainer, batches: Sequence[list[dict[str, Any]]], rate: float) -> float:
    """Steps at a constant rate with an optimiser of their own; the loss of the last one."""
    trainer.args.learning_rate, trainer.optimizer = rate, None
    optimizer = trainer.create_optimizer()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = math.nan
    trainer.model.train()
    for step in batches:
        loss = _step_loss(trainer, step)
        if not math.isfinite(loss):
            break
        if trainer.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
        if trainer.protection is not None:
            trainer.protection.before_step(optimizer)
        optimizer.step()
        if trainer.protection is not None:
            trainer.protection.after_step(optimizer)
        trainer.model.zero_grad(set_to_none=True)
    return loss


def _step_loss(trainer: MoeTrainer, batches: list[dict[str, Any]]) -> float:
    """Gradients of one step are added up; returns its loss."""
    items = trainer._get_num_items_in_batch(batches, trainer.args.device)
    total = 0.0
    for batch in batches:
        with trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(dict(batch))
            loss: Tensor = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
        loss = loss if items is not None else loss / len(batches)
        loss.backward()
        total += float(loss.detach())
    return total


@contextmanager
def _put_back(trainer: MoeTrainer) -> Iterator[Callable[[], None]]:
    """Yields what puts the weights back; behind it everything is as it was."""
    model: Any = trainer.model
    rate, optimizer, was_training = trainer.args.learning_rate, trainer.optimizer, model.training
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore() -> None:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])

    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), nullcontext() if trainer.routing is None else trainer.routing.paused():
        try:
            yield restore
        finally:
            restore()
            model.train(was_training)
            trainer.args.learning_rate, trainer.optimizer = rate, optimizer
