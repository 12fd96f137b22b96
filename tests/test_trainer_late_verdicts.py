"""Bad steps where the host learns of them one step late, as on a GPU: the same weights, counts, events and errors.

The CPU runs the same code as a GPU once its numbers count as late; only the copy to the host is there at once.
"""

from __future__ import annotations

import copy

import pytest
import torch

from moeft.errors import TrainingError
from moeft.training import readback
from moeft.training.optim import HostAdamW, StochasticAdamW, nothing_if_void, reads_found_inf
from tests.test_trainer_diagnosis import BAD_ROW, train
from tests.test_trainer_guard import equal, finite, run
from tests.tiny_training import adapter_weights, packed_with_lora, tiny_tokenizer

ON_DEVICE = ("adamw_torch_fused", "adamw_moeft_stochastic")


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(readback, "reads_late", lambda device: True)


def outcome(checkpoint, folder, optim, kind, steps, **changes):
    """What is left of a run: weights before every step and at the end, optimiser state, events, logs, counters.

    Without findings of second looks: these faults are over when a late one is taken.
    """
    trainer, fault, sink = run(checkpoint, folder, kind, steps, optim=optim, **changes)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    logs = [
        {key: log[key] for key in ("step", "loss", "learning_rate", "skipped") if key in log}
        for log in trainer.state.log_history
    ]
    events = [(e["step"], e["reason"]) for e in sink.events if e["kind"] == "skipped_step"]
    return {
        "weights": [*fault.weights, adapter_weights(trainer.model)],
        "state": copy.deepcopy(optimizer.state_dict()),
        "rest": (trainer.skipped_steps, trainer.guard.in_a_row, events, logs),
    }


def assert_same(ours, theirs):
    assert all(equal(a, b) for a, b in zip(ours["weights"], theirs["weights"], strict=True))
    assert ours["rest"] == theirs["rest"]
    states = ours["state"]["state"], theirs["state"]["state"]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name])), name


@pytest.mark.parametrize("optim", ON_DEVICE)
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_late_verdict_leaves_what_an_immediate_one_leaves(checkpoints, optim, kind, tmp_path, monkeypatch):
    options = (optim, kind, {1, 3, 4, 6})  # the first, which makes the state, and the last, behind which is no other
    expected = outcome(checkpoints["qwen3_moe"], tmp_path / "now", *options)
    monkeypatch.setattr(readback, "reads_late", lambda device: True)
    ours = outcome(checkpoints["qwen3_moe"], tmp_path / "late", *options)
    assert ours["rest"][0] == 4
    assert_same(ours, expected)
    for before, after in ((0, 1), (2, 3), (3, 4), (5, 6)):
        assert equal(ours["weights"][before], ours["weights"][after])
    assert not equal(ours["weights"][1], ours["weights"][2])
    assert finite(ours["weights"][-1])


def test_bad_step_is_told_late_where_nothing_is_logged_and_names_its_step(checkpoints, tmp_path, late):
    trainer, _, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {2}, logging_steps=100)
    known = []
    trainer.guard.on_skip = lambda step, *_: known.append((step, trainer.state.global_step))
    trainer.train()
    assert known == [(2, 2)]  # while the gradients of step 3 lie there, before they count


def test_second_look_at_a_late_verdict_finds_module_and_row(checkpoints, tmp_path, late):
    model = packed_with_lora(checkpoints["qwen3_moe"])
    (token,) = tiny_tokenizer()("Z").input_ids
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[token] = float("nan")
    trainer, (event,) = train(model, tmp_path, max_steps=6, num_train_epochs=1, logging_steps=100)
    assert trainer.skipped_steps == 1
    assert (event["module"], event["rows"]) == ("model.embed_tokens", (BAD_ROW,))


def test_training_stops_late_and_names_the_last_bad_step(checkpoints, tmp_path, late):
    options = {"max_steps": 9, "max_skipped_steps": 3, "logging_steps": 100}
    trainer, _, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {2, 4, 5, 6}, **options)
    with pytest.raises(TrainingError, match=r"3 steps in a row had a non-finite gradient, last step 6; lower the"):
        trainer.train()
    assert trainer.skipped_steps == 4
    assert trainer.state.global_step == 6
    assert finite(adapter_weights(trainer.model))


@pytest.mark.parametrize("optim", ON_DEVICE)
def test_checkpoint_behind_a_bad_step_knows_of_it(checkpoints, tmp_path, optim, late):
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 100}
    whole = outcome(checkpoints["olmoe"], tmp_path / "whole", optim, "gradient", {3, 5}, **options)
    trainer, _, _ = run(checkpoints["olmoe"], tmp_path / "resumed", "gradient", {5}, optim=optim, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trainer.skipped_steps == 2
    assert equal(adapter_weights(trainer.model), whole["weights"][-1])


def test_optimizer_keeps_no_verdict_behind_a_step(checkpoints, tmp_path, late):
    """A stale one would void steps that others take with it."""
    trainer, _, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {6})
    trainer.train()
    assert trainer.optimizer.optimizer.found_inf is None


def parameters():
    return [torch.nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (lambda: torch.optim.AdamW(parameters(), fused=True), True),
        (lambda: torch.optim.Adam(parameters(), fused=True), True),
        (lambda: StochasticAdamW(parameters()), True),
        (lambda: torch.optim.AdamW(parameters()), False),
        (lambda: torch.optim.SGD(parameters(), fused=True, momentum=0.9), False),  # its first step would leave garbage
        (lambda: HostAdamW(parameters()), False),
    ],
)
def test_only_optimizers_that_can_get_the_verdict_on_the_device(make, reads):
    optimizer = make()
    assert reads_found_inf(optimizer, torch.device("cpu")) is (optimizer if reads else None)


def test_number_on_a_gpu_is_not_given_to_kernels_of_the_host():
    assert reads_found_inf(torch.optim.AdamW(parameters(), fused=True), torch.device("cuda", 0)) is None


def test_others_are_told_by_having_no_gradients(checkpoints, tmp_path, late):
    trainer, fault, _ = run(checkpoints["olmoe"], tmp_path, "gradient", {3}, optim="adamw_torch")
    trainer.train()
    assert equal(fault.weights[2], fault.weights[3])
    assert trainer.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_void_step_of_the_stochastic_optimizer_changes_no_bit(dtype):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(33, dtype=dtype))
    optimizer = StochasticAdamW([weight], lr=0.1)
    weight.grad = torch.randn(33, dtype=dtype)
    optimizer.step()
    before = [weight.detach().clone(), *(optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq"))]
    weight.grad[3] = float("nan")
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.forget_step()
    state = optimizer.state[weight]
    after = [weight.detach(), state["exp_avg"], state["exp_avg_sq"]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert state["step"] == 1


def test_protection_adds_nothing_behind_a_void_step():
    optimizer = torch.optim.AdamW(parameters(), fused=True)
    change = torch.tensor([float("nan"), 1.0])
    assert nothing_if_void(change, optimizer) is change
    optimizer.found_inf = torch.ones(())
    assert nothing_if_void(change, optimizer).tolist() == [0, 0]
    optimizer.found_inf = torch.zeros(())
    assert torch.equal(nothing_if_void(change, optimizer)[1], change[1])
