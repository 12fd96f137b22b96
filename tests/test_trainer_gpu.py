"""Training steps on a GPU: the host waits for nothing between two readings, and bad steps change nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from tests.test_trainer_guard import equal, finite, run
from tests.test_trainer_late_verdicts import ON_DEVICE
from tests.tiny_training import adapter_weights, packed_with_lora, sft_trainer, sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, sm_80 or newer"),
]
ON_GPU = {"use_cpu": False, "dataloader_pin_memory": True, "logging_steps": 100}
WARM_UP = 3  # steps that compile kernels, make state and grow pinned memory


class NoWaits(TrainerCallback):
    """Makes an error of every wait, from the end of a step to the end of a later one; loading rows included."""

    def __init__(self, last):
        self.last = last
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        elif state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")
        self.steps += torch.cuda.get_sync_debug_mode() > 0


@pytest.fixture
def no_waits():
    yield NoWaits(last=WARM_UP + 3)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("optim", ON_DEVICE)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_steps_of_the_trainer_wait_for_nothing(checkpoints, tmp_path, no_waits, name, optim, packing):
    trainer = sft_trainer(
        packed_with_lora(checkpoints[name]),
        tmp_path,
        sums(96),
        optim=optim,
        packing=packing,
        max_length=64,
        max_steps=WARM_UP + 4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        check_frozen_base=False,
        **ON_GPU,
    )
    trainer.add_callback(no_waits)
    trainer.train()
    assert no_waits.steps == 3
    assert finite(adapter_weights(trainer.model))


@pytest.mark.parametrize("optim", [*ON_DEVICE, "adamw_torch", "adamw_moeft_host"])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_bad_steps_change_no_weight(checkpoints, tmp_path, optim, kind):
    trainer, fault, sink = run(checkpoints["qwen3_moe"], tmp_path, kind, {1, 3, 4, 6}, optim=optim, **ON_GPU)
    trainer.train()
    weights = [*fault.weights, adapter_weights(trainer.model)]
    for before, after in ((0, 1), (2, 3), (3, 4), (5, 6)):
        assert equal(weights[before], weights[after])
    assert not equal(weights[1], weights[2])
    assert finite(weights[-1])
    assert trainer.skipped_steps == 4
    skips = [(e["step"], e["reason"]) for e in sink.events if e["kind"] == "skipped_step"]
    assert skips == [(step, f"non-finite {kind}") for step in (1, 3, 4, 6)]
    states = trainer.optimizer.state.values()
    assert {int(state["step"]) for state in states} == {2}
