"""Steps that are not finite: real NaN and infinity in the computation, and what they must not do."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from moeft.data.collate import PaddingCollator
from moeft.errors import TrainingError
from tests.tiny_training import adapter_weights, arguments, packed_with_lora, sft_trainer


class Fault(TrainerCallback):
    """Spoils the computation of some steps, and keeps the adapter as it was before each step."""

    def __init__(self, model, kind, steps):
        self.steps = steps
        self.active = False
        self.weights = []
        if kind == "gradient":
            parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
            parameter.register_hook(self.spoil_gradient)
        else:
            model.get_base_model().model.norm.register_forward_hook(self.spoil_hidden)

    def spoil_gradient(self, gradient):
        if not self.active:
            return None
        spoiled = gradient.clone()
        spoiled[0, 0] = math.nan
        return spoiled

    def spoil_hidden(self, module, inputs, output):
        # The logits stay finite and the gradient is that of finite states; only the sum of the loss overflows.
        return output + (output * 3e37).detach() if self.active else None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.active = state.global_step + 1 in self.steps
        self.weights.append(adapter_weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.active = False


class Sink:
    """Takes events, as a run folder does."""

    def __init__(self):
        self.events = []

    def event(self, kind, **fields):
        self.events.append({"kind": kind, **fields})


def run(checkpoint, folder, kind, steps, **changes):
    model = packed_with_lora(checkpoint)
    sink = Sink()
    trainer = sft_trainer(model, folder, events=sink, **changes)
    fault = Fault(model, kind, steps)
    trainer.add_callback(fault)
    return trainer, fault, sink


def finite(weights):
    return all(torch.isfinite(weight).all() for weight in weights.values())


def equal(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Gemma 4's soft cap keeps every logit, and so the loss, small whatever the hidden states are.
@pytest.mark.parametrize(("name", "kind"), [("gemma4", "gradient"), ("qwen3_moe", "gradient"), ("qwen3_moe", "loss")])
def test_bad_step_is_skipped_counted_and_an_event(checkpoints, name, kind, tmp_path):
    trainer, fault, sink = run(checkpoints[name], tmp_path, kind, {3})
    trainer.train()
    before = [*fault.weights, adapter_weights(trainer.model)]
    assert equal(before[2], before[3])  # step 3 changed nothing
    assert not equal(before[1], before[2])
    assert not equal(before[3], before[4])
    assert finite(before[-1])
    assert trainer.skipped_steps == 1
    (event,) = [e for e in sink.events if e["kind"] == "skipped_step"]
    assert (event["step"], event["reason"]) == (3, f"non-finite {kind}")
    spoiled = next(n for n, _ in trainer.model.named_parameters() if "lora_B" in n).removeprefix("base_model.model.")
    assert event["module"] == (spoiled if kind == "gradient" else None)


def test_bad_micro_batch_skips_the_whole_step(checkpoints, tmp_path):
    trainer, fault, _ = run(
        checkpoints["qwen3_moe"], tmp_path, "loss", {2}, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    trainer.train()
    assert equal(fault.weights[1], fault.weights[2])
    assert trainer.skipped_steps == 1


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_plain_trainer_lets_the_same_fault_into_the_step(checkpoints, kind, tmp_path):
    trainer, _, _ = run(checkpoints["qwen3_moe"], tmp_path, kind, set())
    model = packed_with_lora(checkpoints["qwen3_moe"])
    fault = Fault(model, kind, {3})
    options = arguments(tmp_path, remove_unused_columns=False, report_to="none")
    plain = Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=trainer.train_rows.examples,
        data_collator=PaddingCollator(0),
        callbacks=[fault],
    )
    plain.train()
    if kind == "gradient":
        assert not finite(adapter_weights(model))
    else:
        assert not equal(fault.weights[2], fault.weights[3])


def test_training_stops_after_too_many_bad_steps_in_a_row(checkpoints, tmp_path):
    trainer, _, sink = run(checkpoints["olmoe"], tmp_path, "gradient", {2, 4, 5, 6}, max_steps=9, max_skipped_steps=3)
    with pytest.raises(TrainingError, match=r"3 steps in a row had a non-finite gradient, last step 6; lower the"):
        trainer.train()
    assert trainer.skipped_steps == 4
    assert finite(adapter_weights(trainer.model))
    assert [e["step"] for e in sink.events if e["kind"] == "skipped_step"] == [2, 4, 5, 6]


def test_count_and_guard_survive_a_resume(checkpoints, tmp_path):
    first, _, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {2}, max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    second, fault, sink = run(checkpoints["olmoe"], tmp_path, "gradient", {5}, max_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.skipped_steps == 2
    assert [e["step"] for e in sink.events if e["kind"] == "skipped_step"] == [5]
    assert equal(fault.weights[1], fault.weights[2])


def test_row_of_bad_steps_goes_on_over_a_resume(checkpoints, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_skipped_steps": 3}
    first, _, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {2, 3}, max_steps=3, **options)
    first.train()
    second, _, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {4}, max_steps=6, **options)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
