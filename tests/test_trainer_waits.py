"""How often a training step reads a value from the device, which on a GPU means to wait for all that was launched."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import moeft
from tests.tiny_training import arguments, packed_with_lora, sft_trainer, sums

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")


class HostReads(TorchDispatchMode):
    """Operations outside the model whose result the host needs, while it is told to count."""

    def __init__(self, model):
        super().__init__()
        self.found = []
        self.inside = 0
        model.register_forward_pre_hook(self.enter)
        model.register_forward_hook(self.leave)

    def enter(self, *_):
        self.inside += 1

    def leave(self, *_):
        self.inside -= 1

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if not self.inside and any(name in str(function) for name in READS):
            self.found.append(str(function))
        return function(*arguments, **(keywords or {}))


def reads_of(trainer):
    with HostReads(trainer.model) as reads:
        trainer.train()
    return len(reads.found)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_reads_the_device_once_whatever_it_accumulates(checkpoints, tmp_path, packing):
    """Differences of two runs leave out what is read when training begins and ends."""
    rows = sums(96)
    counts = {}
    for steps in (2, 4):
        for batches in (1, 3):
            trainer = sft_trainer(
                packed_with_lora(checkpoints["olmoe"]),
                tmp_path / f"{steps} {batches}",
                rows,
                packing=packing,
                max_steps=steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=batches,
                logging_steps=100,
                check_frozen_base=False,
            )
            counts[steps, batches] = reads_of(trainer)
    values_of_a_read = 2  # whether the loss and whether the gradients are finite, brought over together
    assert counts[4, 1] - counts[2, 1] == counts[4, 3] - counts[2, 3] <= 2 * values_of_a_read


@pytest.mark.parametrize("given", [None, {"non_blocking": False}])
def test_pinned_batches_are_copied_without_a_wait_unless_told_otherwise(tmp_path, given):
    args = moeft.SFTConfig(**arguments(tmp_path, dataloader_pin_memory=True, accelerator_config=given))
    assert args.accelerator_config.non_blocking is (given is None)
    assert not moeft.SFTConfig(**arguments(tmp_path)).accelerator_config.non_blocking
