"""How long a micro-batch takes, found by one forward and backward pass before training, which changes nothing."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from moeft.data.collate import count_tokens
from moeft.training.trainer import MoeTrainer

CANDIDATES = 64
"""Rows at the front of the training set among which some of middling length are chosen."""


class MicroBatch(NamedTuple):
    """One that was timed."""

    seconds: float
    tokens: int
    """Without padding."""


def time_micro_batch(trainer: MoeTrainer) -> MicroBatch | None:
    """Time a micro-batch of middling rows; weights, gradients, random numbers and counters stay as they are.

    Args:
        trainer: One that has not begun to train.

    Returns:
        None if the model is shared between processes, which would all have to take part.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.world_size > 1:
        return None
    rows: Any = trainer.train_dataset
    some = sorted((rows[i] for i in range(min(CANDIDATES, len(rows)))), key=lambda row: len(row["input_ids"]))
    size = min(trainer.args.train_batch_size, len(some))
    middle = (len(some) - size) // 2
    batch = trainer.data_collator(some[middle : middle + size])
    model: Any = trainer.model
    was_training = model.training
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), nullcontext() if trainer.routing is None else trainer.routing.paused():
        model.train()
        try:
            # The first pass also allocates and compiles what later ones find.
            _pass(trainer, trainer.data_collator(some[:1]))
            seconds = _pass(trainer, batch)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
    return MicroBatch(seconds, count_tokens(batch))


def _pass(trainer: MoeTrainer, batch: dict[str, Any]) -> float:
    start = time.perf_counter()
    with trainer.explained_memory():
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        loss.backward()
        float(loss.detach())  # waits for the device
    return time.perf_counter() - start
