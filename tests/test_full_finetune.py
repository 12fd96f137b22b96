"""Weights of the model itself, trained by role: what trains, what stays, what resumes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import moeft
from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.integration.trained_roles import parameters_by_role, train_roles
from moeft.training import trained_weights
from tests.tiny_models import save_tiny_model
from tests.tiny_training import adapter_weights, load, losses, sft_trainer, sums

FULL = {"optim": "adamw_moeft_host", "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return save_tiny_model("gemma4", tmp_path_factory.mktemp("bf16"), torch.bfloat16)


def in_full(folder, roles=("attention",), dtype=torch.float32, **options):
    model = load(folder, **options).to(dtype)
    train_roles(model, roles)
    return model


def test_every_weight_has_a_role_or_never_trains(checkpoint):
    roles = {name: role for name, _, _, role in parameters_by_role(load(checkpoint))}
    assert {"attention", "experts", "router", "embeddings", "norms"} <= set(roles.values())
    assert [name for name, role in roles.items() if role is None and "sinks" not in name] == []
    assert all(role == "norms" for name, role in roles.items() if name.rpartition(".")[0].endswith("norm"))


def test_frozen_weights_get_no_gradient_no_optimizer_state_and_do_not_move(bf16, tmp_path):
    model = in_full(bf16, dtype=torch.bfloat16)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = sft_trainer(model, tmp_path, **FULL)
    trainer.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 11  # 4 projections in each of 3 layers, but no v_proj with full attention
    assert all("self_attn" in name for name, p in model.named_parameters() if p.requires_grad)
    states = [state for state in trainer.optimizer.state.values() if state]
    assert sum(state["exp_avg"].numel() for state in states) == sum(p.numel() for p in trained)
    assert all(state["master"].dtype == torch.float32 for state in states)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
            assert torch.equal(parameter, frozen[name]), name
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize(("optim", "packed"), [("adamw_moeft_host", True), ("adamw_moeft_stochastic", False)])
def test_interrupted_full_finetune_ends_with_identical_weights(bf16, optim, packed, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": optim, "learning_rate": 2e-3}

    def model():
        found = moeft.load(bf16, moeft.NF4Config() if packed else None)[0]
        train_roles(found, ["attention", "norms"])
        return found

    whole = sft_trainer(model(), tmp_path, **options)
    start = adapter_weights(whole.model)
    whole.train()
    files = sorted(path.name for path in (tmp_path / "checkpoint-2").glob("*.safetensors"))
    assert files == [trained_weights.FILE]
    resumed = sft_trainer(model(), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(adapter_weights(resumed.model)[name], weight), name
        assert not torch.equal(start[name], weight), name


@pytest.mark.parametrize("experts_lora", [False, True])
def test_the_best_weights_come_back_at_the_end(bf16, experts_lora, tmp_path):
    """Of weights in full alone, and beside an adapter."""
    model = moeft.load(bf16, moeft.NF4Config())[0]
    if experts_lora:
        model = moeft.add_lora(model, 2, targets=("experts",), seed=0)
    train_roles(model, ["attention"])
    best = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    # The loss falls, so the first checkpoint is the best if a large one is wanted.
    best |= {"load_best_model_at_end": True, "greater_is_better": True}
    trainer = sft_trainer(model, tmp_path, eval_dataset=sums(8, 3), **best, **FULL)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    kept = load_file(tmp_path / "checkpoint-1" / trained_weights.FILE)
    found = trained_weights.of_base({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert kept.keys() <= found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in kept.items())
    if experts_lora:
        kept = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
        found = get_peft_model_state_dict(model)
        assert kept.keys() == found.keys()
        assert all(torch.equal(found[name].to(weight.dtype), weight) for name, weight in kept.items())


def test_adapter_on_experts_and_attention_in_full_resume_together(bf16, tmp_path):
    def model():
        found = moeft.add_lora(moeft.load(bf16, moeft.NF4Config())[0], 2, targets=("experts",), seed=0)
        train_roles(found, ["attention"])
        return found

    options = {**FULL, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = sft_trainer(model(), tmp_path, **options)
    whole.train()
    resumed = sft_trainer(model(), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = adapter_weights(resumed.model)
    assert {"lora_A" in name for name in after} == {True, False}
    for name, weight in adapter_weights(whole.model).items():
        assert torch.equal(after[name], weight), name


def test_checkpoint_of_other_roles_is_refused(checkpoints, tmp_path):
    trained_weights.save(trained_weights.gather(in_full(checkpoints["olmoe"])), tmp_path)
    with pytest.raises(CheckpointError, match=r"norm.weight trains in the model only"):
        trained_weights.load(in_full(checkpoints["olmoe"], ["attention", "norms"]), tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks trained_weights.safetensors"):
        trained_weights.load(in_full(checkpoints["olmoe"]), tmp_path / "other")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["experts"], r"experts, but .*gate_up_proj is held in 4 bit .* quantization.experts to false"),
        (["mlp"], "the model has none; it has attention, embeddings, experts, norms, router"),
    ],
)
def test_role_that_cannot_train_is_refused(checkpoints, roles, message):
    with pytest.raises(UnsupportedModelError, match=message):
        train_roles(load(checkpoints["olmoe"], quantization_config=moeft.NF4Config()), roles)


@pytest.mark.parametrize(("roles", "message"), [(["atention"], "expected some of"), (["norms"] * 2, "more than once")])
def test_misspelt_and_repeated_roles_are_refused(checkpoints, roles, message):
    with pytest.raises(ValueError, match=message):
        train_roles(load(checkpoints["olmoe"]), roles)
