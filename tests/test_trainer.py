"""Training with SFTTrainer on tiny packed models: what changes, what is logged, what a step means."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import moeft
from moeft.data.collate import PaddingCollator
from tests.test_quantizer import with_rounded_weights
from tests.tiny_training import (
    TARGETS,
    adapter_weights,
    arguments,
    frozen_hash,
    load,
    losses,
    packed_with_lora,
    sft_trainer,
    sums,
    tiny_tokenizer,
)
from tests.vectors.generate_golden_losses import GOLDEN_LOSSES, golden_losses


def test_only_the_adapter_changes_and_the_loss_falls(checkpoint, tmp_path):
    model = packed_with_lora(checkpoint)
    frozen, adapter = frozen_hash(model), adapter_weights(model)
    trainer = sft_trainer(model, tmp_path, max_steps=12)
    trainer.train()
    assert frozen_hash(model) == frozen
    for name, weight in adapter_weights(model).items():
        assert not torch.equal(weight, adapter[name]), name
    # Random weights start near a uniform guess, and twelve steps of Adam at 5e-3 reach the commonest characters.
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


@pytest.mark.parametrize(
    ("name", "packed"), [("gemma4", True), ("qwen3_moe", False)], ids=["gemma4 packed", "qwen3_moe unpacked"]
)
def test_forty_steps_equal_plain_transformers_and_plain_peft(checkpoints, name, packed, tmp_path):
    if packed:
        ours = packed_with_lora(checkpoints[name])
        base = with_rounded_weights(checkpoints[name], ours.get_base_model())
    else:
        ours = moeft.add_lora(load(checkpoints[name], experts_implementation="moeft"), 4, targets=TARGETS, seed=0)
        base = load(checkpoints[name])
    ours.save_pretrained(tmp_path / "start")
    plain = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    assert {type(m).__module__ for m in plain.modules() if "moeft" in type(m).__module__} == set()
    # Adam divides a gradient by its own size plus epsilon: with the usual 1e-8, one that is all rounding (1.6e-8 where
    # others are 2e-2) moves its weight by any part of a whole step.
    steps = {"max_steps": 40, "adam_epsilon": 1e-4}
    trainer = sft_trainer(ours, tmp_path / "ours", **steps)
    trainer.train()
    options = arguments(tmp_path / "plain", **steps, remove_unused_columns=False, report_to="none")
    baseline = Trainer(
        model=plain,
        args=TrainingArguments(**options),
        train_dataset=trainer.train_rows.examples,
        data_collator=PaddingCollator(0),
    )
    baseline.train()
    assert len(losses(trainer)) == len(losses(baseline)) == 40
    # Float32 sums of some 1,000 products differ by 2e-6 (sqrt(1000) half ulps) when their order does: forward, backward
    # and optimiser of a few layers, five times that. Nothing adds up over the steps: 1.3e-6 was seen, 2e-7 for
    # qwen3_moe.
    assert losses(trainer) == pytest.approx(losses(baseline), rel=1e-5)


def test_losses_of_twenty_steps_are_those_recorded(checkpoint, family, tmp_path):
    recorded = json.loads(GOLDEN_LOSSES.read_text())[family]
    # Another machine's BLAS sums in another order, and Adam's default epsilon makes up to 4e-5 of that in twenty steps
    # (docs/log.md): twice as much.
    assert golden_losses(checkpoint, tmp_path) == pytest.approx(recorded, rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["gemma4", "olmoe"])
def test_gradient_checkpointing_trains_the_same_weights(checkpoints, name, reentrant, tmp_path):
    weights = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = packed_with_lora(checkpoints[name])
        sft_trainer(model, tmp_path, max_steps=3, **options).train()
        weights.append(adapter_weights(model))
    for key, expected in weights[0].items():
        assert torch.equal(weights[1][key], expected), key


def test_gradient_accumulation_trains_what_one_large_batch_does(checkpoints, tmp_path):
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = packed_with_lora(checkpoints["qwen3_moe"])
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        # SGD: Adam divides by the gradient and would blow the rounding of elements near zero up to a whole step.
        sft_trainer(model, tmp_path, max_steps=3, optim="sgd", learning_rate=0.1, **options).train()
        weights.append(adapter_weights(model))
    for key, expected in weights[0].items():
        torch.testing.assert_close(weights[1][key], expected, rtol=1e-4, atol=1e-6)


def test_evaluation_loss_is_the_mean_over_held_out_tokens(checkpoint, tmp_path):
    model = packed_with_lora(checkpoint)
    held_out = sums(7, offset=1)
    held_out[0] = {"prompt": "Say it.", "completion": "a reply much longer than the others"}
    trainer = sft_trainer(model, tmp_path, eval_dataset=held_out, per_device_eval_batch_size=2)
    total, count, means = 0.0, 0, []
    for example in trainer.eval_rows.examples:
        ids = torch.from_numpy(example["input_ids"])[None].long()
        labels = torch.from_numpy(example["labels"])[1:].long()
        with torch.no_grad():
            log_probs = model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        rows = (labels != -100).nonzero().squeeze(1)
        loss = -log_probs[rows, labels[rows]]
        total, count = total + loss.sum().item(), count + len(rows)
        means.append(loss.mean().item())
    assert abs(sum(means) / len(means) - total / count) > 1e-3  # a mean of means would be told apart
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_logs_bear_throughput_and_peak_memory(checkpoints, tmp_path):
    trainer = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, eval_dataset=sums(4), max_steps=4)
    trainer.evaluate()
    result = trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    tokens = trainer.throughput.total_tokens
    for log in logs:
        assert log["peak_bytes"] > 2**26  # a process with torch in it
        # No step is faster than all of them together could be, nor slower than the whole run.
        assert log["tokens_per_second"] > tokens / 4 / result.metrics["train_runtime"] / 2
    assert trainer.throughput.total_seconds < result.metrics["train_runtime"]


def test_throughput_counts_tokens_without_padding(checkpoints, tmp_path):
    trainer = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert trainer.throughput.total_tokens == trainer.train_rows.num_tokens


def test_metrics_from_logits_are_refused_because_there_are_none(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="compute_metrics needs logits"):
        moeft.SFTTrainer(
            model=load(checkpoints["olmoe"]),
            args=moeft.SFTConfig(**arguments(tmp_path)),
            train_dataset=sums(),
            processing_class=tiny_tokenizer(),
            compute_metrics=lambda prediction: {},
        )


def test_training_in_bfloat16_autocast_works(checkpoint, tmp_path):
    trainer = sft_trainer(packed_with_lora(checkpoint), tmp_path, max_steps=8, bf16=True, eval_dataset=sums(4))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(trainer.model).values())
