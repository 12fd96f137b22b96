"""Batches of rows of like length, in an order that can be repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Trainer's sampler for ``group_by_length``, with an order that seed and epoch alone decide.

    Trainer's own draws from the global generator, so an evaluation before the first epoch, which a continued run does
    not repeat, would change which rows follow a resume.

    Args:
        batch_size: Rows to hold together: those of one optimiser step.
        dataset: Rows with ``input_ids``.
        seed: Seed of the order.
    """

    def __init__(self, batch_size: int, dataset: Sequence[Any], seed: int) -> None:
        lengths = [len(row["input_ids"]) for row in dataset]
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; data loaders call it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
