"""Optimisers, learning rates and adapter dtypes of the trainer: what a setting changes in training."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

import moeft
from moeft.training.optim import HostAdamW
from tests.tiny_training import adapter_weights, arguments, load, losses, packed_with_lora, sft_trainer

HOST = {"adamw_moeft_host": 32, "adamw_moeft_8bit": 8}


def rates(trainer):
    """Learning rate of each step."""
    return [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]


def rate_by_name(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_host_adamw_trains_as_torch_adamw_does(checkpoints, tmp_path):
    runs = []
    for optim in ("adamw_torch", "adamw_moeft_host", "adamw_moeft_8bit"):
        model = packed_with_lora(checkpoints["olmoe"])
        options = {"optim_args": "min_8bit_size=0"} if optim == "adamw_moeft_8bit" else {}
        trainer = sft_trainer(model, tmp_path, optim=optim, max_steps=8, weight_decay=0.01, **options)
        trainer.train()
        runs.append(trainer)
    exact, full, short = (losses(trainer) for trainer in runs)
    # As between other orders of summation (tests/test_trainer.py): 2e-6 a step.
    assert full == pytest.approx(exact, rel=8 * 2e-6)
    # 8-bit moments are wrong by at most 0.7 % of the largest of their block.
    assert short == pytest.approx(exact, rel=0.02)
    assert short != exact
    state = runs[2].optimizer.state_dict()["state"].values()
    assert {s["exp_avg"].dtype for s in state} == {torch.uint8}


@pytest.mark.parametrize(("optim", "dtype"), [("adamw_moeft_host", "float32"), ("adamw_moeft_8bit", "bfloat16")])
def test_resumed_run_ends_with_identical_weights(checkpoints, optim, dtype, tmp_path):
    options = {
        "optim": optim,
        "optim_args": "min_8bit_size=256",
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "loraplus_lr_ratio": 4.0,
        "lr_scheduler_type": "cosine",
        "min_lr_ratio": 0.1,
    }
    whole = sft_trainer(packed_with_lora(checkpoints["qwen3_moe"], dtype=dtype), tmp_path, **options)
    whole.train()
    resumed = sft_trainer(packed_with_lora(checkpoints["qwen3_moe"], dtype=dtype), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in adapter_weights(whole.model).items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(adapter_weights(resumed.model)[name], weight), name
    assert losses(resumed) == losses(whole)
    assert rates(resumed) == rates(whole)


def test_step_with_a_non_finite_gradient_leaves_weights_and_state_alone(checkpoints, tmp_path):
    model = packed_with_lora(checkpoints["olmoe"])
    trainer = sft_trainer(model, tmp_path, optim="adamw_moeft_8bit", max_steps=3)
    before, poisoned = {}, next(p for p in model.parameters() if p.requires_grad)
    poisoned.register_hook(lambda grad: grad * float("nan") if trainer.state.global_step == 2 else grad)

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.update(adapter_weights(model))

    trainer.add_callback(Remember())
    trainer.train()
    assert trainer.skipped_steps == 1
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())
    assert {s["step"] for s in trainer.optimizer.state_dict()["state"].values()} == {2}


@pytest.mark.parametrize("optim", HOST)
def test_settings_survive_a_round_trip_through_a_dictionary(optim, tmp_path):
    config = moeft.SFTConfig(**arguments(tmp_path, optim=optim, lr_scheduler_type="cosine", min_lr_ratio=0.2))
    saved = config.to_dict()
    names = ("output_dir", "optim", "min_lr_ratio", "lr_scheduler_type", "lr_scheduler_kwargs")
    again = moeft.SFTConfig(**{name: saved[name] for name in names})
    assert again.optim == config.optim == optim
    assert again.lr_scheduler_kwargs == config.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert again.lr_scheduler_type == "cosine_with_min_lr"


def test_optimisers_of_transformers_keep_their_names(tmp_path):
    for kind in OptimizerNames:
        config = moeft.SFTConfig(**arguments(tmp_path, optim=kind.value))
        assert config.optim is kind
    config = moeft.SFTConfig(**arguments(tmp_path, optim="adafactor"))
    trainer_class = moeft.SFTTrainer.get_optimizer_cls_and_kwargs(config)
    assert trainer_class == Trainer.get_optimizer_cls_and_kwargs(config)


def test_options_of_the_trainer_reach_the_optimizer(tmp_path):
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "learning_rate": 0.25}
    config = moeft.SFTConfig(
        **arguments(tmp_path, **options), optim="adamw_moeft_8bit", optim_args="master_weights=false, min_8bit_size=7"
    )
    optimizer_class, given = moeft.SFTTrainer.get_optimizer_cls_and_kwargs(config)
    assert optimizer_class is HostAdamW
    assert given == {
        "lr": 0.25,
        "betas": (0.8, 0.95),
        "eps": 1e-5,
        "state_bits": 8,
        "master_weights": False,
        "min_8bit_size": 7,
    }


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_moeft_8bit", "adamw_bnb_8bit"])
def test_loraplus_gives_b_factors_their_rate(checkpoints, optim, tmp_path):
    model = packed_with_lora(checkpoints["gemma4"])
    settings = {"optim": optim, "learning_rate": 1e-3, "loraplus_lr_ratio": 16.0, "weight_decay": 0.01}
    trainer = sft_trainer(model, tmp_path, max_steps=1, lr_scheduler_type="constant", **settings)
    trainer.train()
    ours = rate_by_name(trainer.optimizer, model)
    peer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    assert ours == rate_by_name(peer, model)
    assert set(ours.values()) == {1e-3, 16e-3}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]} == {0.01}
    assert rates(trainer) == [1e-3]  # the log shows the rate of A


def test_loraplus_without_an_adapter_is_refused(checkpoints, tmp_path):
    trainer = sft_trainer(load(checkpoints["olmoe"]), tmp_path, loraplus_lr_ratio=16.0)
    with pytest.raises(ValueError, match="the model trains no B factor of LoRA"):
        trainer.create_optimizer()


SCHEDULES = {
    "linear": ({"lr_scheduler_type": "linear"}, lambda t: 1 - t / 8),
    "cosine": ({"lr_scheduler_type": "cosine"}, lambda t: (1 + math.cos(math.pi * t / 8)) / 2),
    "floor": (
        {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1},
        lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / 8)) / 2,
    ),
    "floor of one": ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 1}, lambda t: 1.0),
    "constant": ({"lr_scheduler_type": "constant_with_warmup"}, lambda t: 1.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_sets_the_rate_of_every_step(checkpoints, name, tmp_path):
    options, expected = SCHEDULES[name]
    trainer = sft_trainer(
        packed_with_lora(checkpoints["olmoe"]), tmp_path, max_steps=10, warmup_steps=2, learning_rate=1e-3, **options
    )
    trainer.create_optimizer_and_scheduler(10)
    seen = []
    for _ in range(10):
        seen.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert seen == pytest.approx([0.0, 0.5e-3] + [1e-3 * expected(t) for t in range(8)])


def test_gradients_are_clipped_to_their_norm_before_the_step(checkpoints, tmp_path):
    norms = []
    for limit in (0.0, 1e-3):
        trainer = sft_trainer(
            packed_with_lora(checkpoints["olmoe"]), tmp_path, max_steps=1, max_grad_norm=limit, optim="adamw_moeft_host"
        )
        trainer.train()
        means = [s["exp_avg"] / 0.1 for s in trainer.optimizer.state_dict()["state"].values()]  # (1 - beta1) gradient
        norms.append(torch.stack([mean.norm() for mean in means]).norm().item())
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "base", "dtype"),
    [("olmoe", "float32", "bfloat16"), ("gemma4", "bfloat16", "bfloat16"), ("gemma4", "bfloat16", "float32")],
)
def test_adapter_dtype_is_kept_through_training_and_saving(checkpoints, family, base, dtype, tmp_path):
    checkpoint = checkpoints[family]
    packed = load(checkpoint, quantization_config=moeft.NF4Config()).to(getattr(torch, base))
    model = moeft.add_lora(packed, 4, targets=("attention", "experts"), seed=0, dtype=dtype)
    trainer = sft_trainer(model, tmp_path, max_steps=2, optim="adamw_moeft_host", learning_rate=1e-4)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    weights = adapter_weights(model)
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert all(weight.count_nonzero() for name, weight in weights.items() if "lora_B" in name)
    has_master = ["master" in s for s in trainer.optimizer.state_dict()["state"].values()]
    assert set(has_master) == {dtype == "bfloat16"}
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter", autocast_adapter_dtype=False)
    for name, weight in again.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, weights[name].to(weight.dtype)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torhc"}, "optim is 'adamw_torhc', which neither .* knows; did you mean 'adamw_torch'?"),
        ({"optim": "adamw_moeft_8bits"}, "did you mean 'adamw_moeft_8bit'?"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin', .*did you mean 'cosine'?"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio is 0, expected a positive number"),
        ({"loraplus_lr_ratio": "16"}, "loraplus_lr_ratio is '16', expected a positive number"),
        ({"min_lr_ratio": 1.5, "lr_scheduler_type": "cosine"}, "min_lr_ratio is 1.5, expected a number from 0 to 1"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio is for a cosine schedule, not 'linear'"),
        ({"optim": "adamw_moeft_host", "optim_args": "masters=1"}, "optim_args has 'masters=1', expected master_w"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        moeft.SFTConfig(**arguments(tmp_path, **changes))


def test_unknown_adapter_dtype_is_refused(checkpoints):
    with pytest.raises(ValueError, match="dtype is float16, expected float32 or bfloat16"):
        packed_with_lora(checkpoints["olmoe"], dtype="float16")
