"""Guards of a training besides those on single steps: the frozen base, missing gradients, routing, memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from moeft.errors import TrainingError
from moeft.planning import Settings, plan
from moeft.training.out_of_memory import is_out_of_memory
from moeft.training.routing_monitor import RoutingMonitor
from tests.test_trainer_guard import Sink
from tests.tiny_models import tiny_model, token_ids
from tests.tiny_training import packed_with_lora, sft_trainer

CPU = SimpleNamespace(device=torch.device("cpu"))


class FlipOneBit(TrainerCallback):
    """Changes one packed byte and one norm in the middle of training."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            tensors = dict(model.named_parameters())
            tensors[next(n for n in tensors if n.endswith("experts.base_layer.base_layer.down_proj"))].data[0, 0] ^= 1
            tensors["base_model.model.model.norm.weight"].data[0] += 1e-6


def test_unchanged_base_is_recorded_with_hash_and_cost(checkpoints, tmp_path):
    sink = Sink()
    sft_trainer(packed_with_lora(checkpoints["gemma4"]), tmp_path, events=sink, max_steps=1).train()
    (event,) = [event for event in sink.events if event["kind"] == "frozen_base"]
    assert event["changed"] == []
    assert len(event["sha256"]) == 64
    assert event["seconds"] > 0
    assert event["bytes"] > 50_000


def test_one_changed_bit_of_the_base_is_an_error_that_names_its_tensor(checkpoints, tmp_path):
    trainer = sft_trainer(packed_with_lora(checkpoints["qwen3_moe"]), tmp_path, max_steps=2)
    trainer.add_callback(FlipOneBit())
    with pytest.raises(
        TrainingError, match=r"changed 2 frozen tensors: .*experts.*down_proj, .*model\.norm\.weight; the"
    ):
        trainer.train()


def test_check_of_the_base_can_be_switched_off(checkpoints, tmp_path):
    sink = Sink()
    model = packed_with_lora(checkpoints["qwen3_moe"])
    trainer = sft_trainer(model, tmp_path, events=sink, max_steps=2, check_frozen_base=False)
    trainer.add_callback(FlipOneBit())
    trainer.train()
    assert not [event for event in sink.events if event["kind"] == "frozen_base"]


def test_trainable_parameter_without_gradient_is_an_error_at_the_first_step(checkpoints, tmp_path):
    model = packed_with_lora(checkpoints["olmoe"])
    model.get_base_model().model.layers[1].forgotten = nn.Parameter(torch.zeros(3))
    trainer = sft_trainer(model, tmp_path)
    with pytest.raises(
        TrainingError, match=r"1 of \d+ trainable parameters got no gradient .*layers\.1\.forgotten; the"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_experts_without_a_token_are_listed_and_are_no_error(checkpoints, tmp_path):
    model = packed_with_lora(checkpoints["olmoe"])
    router = model.get_base_model().model.layers[1].mlp.gate.weight.data
    # Of w and -w one is above zero, so two experts always win over expert 2.
    router[1], router[2], router[4] = -router[0], 0, -router[3]
    trainer = sft_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    summary = trainer.routing.summary()
    assert summary["experts"] == 10
    assert summary["idle"]["model.layers.1.mlp.experts"] == [2]
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["idle_experts"] == sum(len(experts) for experts in summary["idle"].values())
    assert log["load_imbalance"] >= 1
    assert 0 <= log["load_entropy"] <= 1
    assert 0 <= log["router_entropy"] <= 1


def counts_of_transformers(model, ids, mask):
    """Tokens per expert and layer from the router logits that transformers itself reports."""
    logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    top_k = model.config.num_experts_per_tok
    kept = mask.flatten() != 0
    return [torch.bincount(layer.topk(top_k).indices[kept].flatten(), minlength=layer.shape[1]) for layer in logits]


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral"])
def test_counts_are_those_of_the_router_without_padding(name):
    model = tiny_model(name).train()
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    monitor, state = RoutingMonitor(model), TrainerState()
    monitor.on_train_begin(CPU, state, TrainerControl())
    monitor.see_mask(mask)
    with monitor.paused():
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask)
    figures = monitor.read()
    monitor.on_step_end(None, state, TrainerControl(should_save=True))
    monitor.on_train_end(None, state, TrainerControl())
    expected = counts_of_transformers(model, ids, mask)
    saved = state.stateful_callbacks["moeft.routing"]
    assert list(saved.values()) == [layer.tolist() for layer in expected]
    loads = torch.stack([layer.double() for layer in expected])
    assert figures["load_imbalance"] == pytest.approx(float((loads.max(1).values / loads.mean(1)).mean()))
    assert figures["idle_experts"] == int((loads == 0).sum())


def test_experts_that_lie_elsewhere_are_counted_where_their_tokens_are():
    module = tiny_model("olmoe").train()
    monitor, state = RoutingMonitor(module), TrainerState()
    for experts in monitor._modules.values():
        experts.to("meta")  # as streamed experts stay in host memory
    monitor.on_train_begin(CPU, state, TrainerControl())
    for name in monitor._modules:
        monitor._count(name, torch.tensor([[0, 1], [1, 2]]), torch.full((2, 2), 0.5))
    assert monitor.read()["load_imbalance"] == pytest.approx(2 / (4 / module.config.num_experts))
    monitor.on_train_end(None, state, TrainerControl())


def test_recomputation_changes_no_figure(checkpoints, tmp_path):
    figures = []
    for checkpointing in (False, True):
        model = packed_with_lora(checkpoints["qwen3_moe"])
        trainer = sft_trainer(model, tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
        trainer.train()
        (log,) = [log for log in trainer.state.log_history if "loss" in log]
        figures.append([log[key] for key in ("load_imbalance", "load_entropy", "router_entropy", "idle_experts")])
    assert figures[0] == pytest.approx(figures[1])


def test_a_step_that_saves_logs_its_routing_too(checkpoints, tmp_path):
    trainer = sft_trainer(
        packed_with_lora(checkpoints["olmoe"]), tmp_path, save_strategy="steps", save_steps=2, max_steps=4
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    assert all("load_imbalance" in log for log in logs)


def test_counts_go_on_over_a_resume(checkpoints, tmp_path):
    def totals(trainer):
        return trainer.state.stateful_callbacks["moeft.routing"]

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.0}
    whole = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path / "whole", **options)
    whole.train()
    resumed = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert totals(resumed) == totals(whole)


class Greedy(nn.Module):
    """A layer that asks for four pebibytes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        torch.empty(2**50)
        return self.inner(*args, **kwargs)


def test_out_of_memory_names_the_parts_and_a_knob(checkpoints, tmp_path):
    model = packed_with_lora(checkpoints["mixtral"])
    layers = model.get_base_model().model.layers
    layers[1].self_attn = Greedy(layers[1].self_attn)
    trainer = sft_trainer(model, tmp_path)
    trainer.forecast = plan(checkpoints["mixtral"], recipe=Settings(checkpointing="none", batch_size=4))
    with pytest.raises(TrainingError, match=r"out of memory in step 1: .*you tried to allocate") as caught:
        trainer.train()
    text = str(caught.value)
    best = next(knob for knob in trainer.forecast.advice if knob.exists)
    assert f"the plan says what saves most: {str(best).strip()}" in text
    assert "held: " in text
    assert "experts 0.00 GiB" in text
    assert "for packed experts: stream them from host memory" in text
    assert "gradient_checkpointing" in text
    assert "for experts" not in text  # packed already
    assert is_out_of_memory(caught.value.__cause__)


def test_other_runtime_errors_pass_unchanged():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
