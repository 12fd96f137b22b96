"""A training step asks nothing of the device: on the meta device there is no number that it could be told."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import moeft
from moeft.integration.checkpointing import POLICIES, apply_checkpointing
from moeft.integration.fused_loss import fuse_loss
from moeft.kernels import dispatch
from moeft.training import readback
from moeft.training.document_isolation import check_document_isolation
from tests.tiny_preferences import dpo_trainer
from tests.tiny_training import load, sft_trainer

triton_targets = pytest.importorskip("tests.triton_targets", reason="needs Triton: pip install triton")
TOKENS = 24


@pytest.fixture
def gpu_without_numbers(monkeypatch):
    """The way of a GPU, on the meta device; launches are counted instead of made."""
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())
    names: list[str] = []
    with triton_targets.counted(names):
        yield names


def trained(folder):
    model = load(folder, quantization_config=moeft.NF4Config(attention=True))
    check_document_isolation(model)
    fuse_loss(model)
    return moeft.add_lora(model, 4, targets=("attention", "experts")).train()


def step(model):
    """Forward and backward of two packs of two examples each."""
    ids = torch.ones(2, TOKENS, dtype=torch.int64, device="meta")
    positions = torch.arange(TOKENS // 2, device="meta").repeat(2).expand(2, -1)
    loss = model(input_ids=ids, position_ids=positions, labels=ids, num_items_in_batch=2 * TOKENS).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_step_on_packs_reads_no_number_of_the_device(checkpoints, name, policy, gpu_without_numbers):
    model = trained(checkpoints[name])
    apply_checkpointing(model, policy)
    loss = step(model.to("meta"))
    assert loss.shape == ()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert "log_probs_kernel" in gpu_without_numbers


class Unread(readback.Readback):
    """Numbers that a device without numbers sends, and nobody reads."""

    def send(self, values):
        assert values.device.type == "meta"


BATCHES = {
    "packs": {"position_ids": torch.arange(TOKENS // 2, device="meta").repeat(2).expand(2, -1)},
    "padded rows": {"attention_mask": torch.ones(2, TOKENS, dtype=torch.int64, device="meta")},
}


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_step_of_the_trainer_reads_no_number_of_the_device(
    checkpoints, tmp_path, name, rows, gpu_without_numbers, monkeypatch
):
    """All that runs between two readings: model, routing counts, throughput, clipping, guard, optimiser, schedule."""
    monkeypatch.setattr(readback, "reads_late", lambda device: True)
    monkeypatch.setattr(readback, "Readback", Unread)
    options = {"optim": "adamw_moeft_stochastic", "check_frozen_base": False, "gradient_accumulation_steps": 2}
    trainer = sft_trainer(trained(checkpoints[name]), tmp_path, packing=rows == "packs", **options)
    monkeypatch.setattr(moeft.SFTConfig, "device", torch.device("meta"))
    model = trainer.model.to("meta")
    trainer.create_optimizer_and_scheduler(2)
    handler, run = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)
    handler.optimizer, handler.model = trainer.optimizer, model
    handler.on_train_begin(*run)
    handler.on_step_begin(*run)
    ids = torch.ones(2, TOKENS, dtype=torch.int64, device="meta")
    batch = {"input_ids": ids, "labels": ids, **BATCHES[rows]}
    steps = [trainer.training_step(model, batch, num_items_in_batch=4 * TOKENS) for _ in range(2)]
    assert sum(steps).device.type == "meta"
    assert trainer._clip_grad_norm(model).device.type == "meta"
    handler.on_pre_optimizer_step(*run)
    trainer.optimizer.step()
    handler.on_optimizer_step(*run)
    trainer.lr_scheduler.step()
    handler.on_step_end(*run)
    assert len(trainer.optimizer.state) == len([p for p in model.parameters() if p.requires_grad])
    assert trainer.guard._unread.step == 1


def test_layers_share_masks_that_attention_adds_as_they_are(checkpoints, gpu_without_numbers):
    """A bool mask would be converted, and kept for backward, in every layer of its own."""
    model = trained(checkpoints["gemma4"]).to("meta")
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    step(model)
    assert {mask.dtype for mask in seen} == {model.get_input_embeddings().weight.dtype}
    assert len(seen) == 3
    assert len({id(mask) for mask in seen}) == 2  # one for each kind


def test_masks_of_transformers_would_read_one(checkpoints, gpu_without_numbers):
    """That the test above can fail."""
    model = trained(checkpoints["gemma4"])
    model.get_base_model().model._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="meta tensors"):
        step(model.to("meta"))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_preference_pairs_read_no_number_of_the_device(checkpoints, tmp_path, layout, gpu_without_numbers, monkeypatch):
    trainer = dpo_trainer(trained(checkpoints["gemma4"]), tmp_path, layout=layout, check_frozen_base=False)
    assert trainer.layout == layout
    monkeypatch.setattr(moeft.DPOConfig, "device", torch.device("meta"))
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(2)])
    batch = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    loss = trainer.training_step(trainer.model.to("meta"), batch, num_items_in_batch=2)
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
