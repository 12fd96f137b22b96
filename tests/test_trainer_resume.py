"""A run that was interrupted ends with the very bits of one that was not."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_training import adapter_weights, losses, packed_with_lora, sft_trainer

# 24 rows: 6 steps per epoch with a batch of 4, so that step 3 lies inside an epoch and step 6 at its end.
SETTINGS = {
    "one batch per step": {"per_device_train_batch_size": 4},
    "two batches per step": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("at", [3, 6], ids=["inside an epoch", "between epochs"])
def test_resumed_run_ends_with_identical_weights(checkpoints, setting, at, tmp_path):
    options = {
        **SETTINGS[setting],
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "linear",
    }
    whole = sft_trainer(packed_with_lora(checkpoints["gemma4"]), tmp_path, **options)
    whole.train()
    resumed = sft_trainer(packed_with_lora(checkpoints["gemma4"]), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(resumed.model)[name], weight), name
    assert losses(resumed) == losses(whole)
    assert resumed.throughput.total_tokens == whole.throughput.total_tokens


def test_resume_of_a_complete_run_trains_nothing_more(checkpoints, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    whole = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, **options)
    whole.train()
    again = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(again.model)[name], weight), name
