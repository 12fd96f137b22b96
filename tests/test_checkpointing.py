"""Policies of what layers keep for backward: the same gradients, fewer bytes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moeft
from moeft.errors import UnsupportedModelError
from moeft.integration import offloading
from moeft.integration.checkpointing import POLICIES, apply_checkpointing, decoder_layers
from moeft.training.probe import time_micro_batch
from moeft.training.range_test import range_test
from tests.tiny_models import FAMILY_NAMES, randomise_lora, tiny_model, token_ids
from tests.tiny_training import adapter_weights, arguments, packed_with_lora, sft_trainer, sums, tiny_tokenizer

IDS = token_ids(2, 24)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model):
    """Loss, gradients, and the experts chosen each time an expert layer ran."""
    routed = []
    experts = [module for name, module in model.named_modules() if name.endswith("experts")]
    hooks = [module.register_forward_pre_hook(lambda m, args: routed.append((id(m), args[1]))) for module in experts]
    model.train().zero_grad()
    loss = loss_of(model)
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, routed


def assert_same_gradients(model, policy, **options):
    apply_checkpointing(model, "none")
    loss, expected, _ = gradients(model)
    apply_checkpointing(model, policy, **options)
    again, ours, routed = gradients(model)
    assert torch.equal(again, loss)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name
    return routed


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_gradients_of_an_adapter_on_packed_weights_are_the_same_bits(checkpoints, name):
    model = packed_with_lora(checkpoints[name])
    randomise_lora(model)
    for policy in ("keep_norm_inputs", "full"):
        assert_same_gradients(model, policy)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_are_the_same_bits_and_experts_run_again_on_the_routing_of_the_forward(family):
    model = tiny_model(family)
    for policy in ("keep_norm_inputs", "full"):
        routed = assert_same_gradients(model, policy)
        by_layer = {layer: [index for key, index in routed if key == layer] for layer, _ in routed}
        for first, *again in by_layer.values():
            assert again
            assert all(torch.equal(index, first) for index in again)


def test_each_layer_may_have_a_policy_of_its_own():
    model = tiny_model("gemma4")
    assert_same_gradients(model, ["none", "keep_norm_inputs", "full"])
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [False, True, True]


def test_blocks_have_their_own_forward_again_after_a_step():
    model = tiny_model("gemma4")
    assert_same_gradients(model, "keep_norm_inputs")
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


class Allocated(TorchDispatchMode):
    """Remembers every storage that an operation returns, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return result

    def living_bytes(self):
        gc.collect()
        return sum(size for storage, size in self.storages.values() if storage() is not None)


def kept_bytes(model, policy):
    """Bytes of new tensors that are alive between forward and backward."""
    apply_checkpointing(model, policy)
    model.train()
    with Allocated() as allocated:
        loss = loss_of(model)
    kept = allocated.living_bytes()
    loss.backward()
    return kept


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_policies_keep_fewer_bytes_the_more_they_do_again(checkpoints, adapter):
    model = packed_with_lora(checkpoints["gemma4"]) if adapter else tiny_model("qwen3_moe")
    kept = {policy: kept_bytes(model, policy) for policy in POLICIES}
    assert kept["none"] > kept["keep_norm_inputs"] > kept["full"] > 0


@pytest.mark.parametrize(
    # Not gpt_oss: its eager attention returns the probabilities beside the output.
    ("family", "adapter"),
    [*((family, False) for family in FAMILY_NAMES if family != "gpt_oss"), ("gemma4", True), ("qwen3_moe", True)],
)
def test_keep_norm_inputs_keeps_the_output_of_each_block_and_no_more(checkpoints, family, adapter):
    # With an adapter the first layer's input needs no gradient, and still must not be kept twice.
    model = packed_with_lora(checkpoints[family]) if adapter else tiny_model(family)
    layers = decoder_layers(model)
    state = IDS.numel() * 64 * 4  # one hidden state of 64 float32 per token
    full, kept = (kept_bytes(model, policy) for policy in ("full", "keep_norm_inputs"))
    outputs = {"gemma4": 3}.get(family, 2) * len(layers) * state  # attention and mlp, and the experts of gemma4
    router = IDS.numel() * (7 * 4 + 3 * (4 + 8)) * len(layers) if family == "gemma4" else 0
    small = 1024 * len(layers)  # random generator states and scalars
    assert outputs + router <= kept - full <= outputs + router + small


def test_full_saves_nothing_in_a_layer_but_its_input():
    model = tiny_model("gemma4")
    apply_checkpointing(model, "full")
    layers, inputs, saved = decoder_layers(model), [], []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.train().model(input_ids=IDS, use_cache=False)
    pointers = [tensor.data_ptr() for tensor in saved]
    assert all(state.data_ptr() in pointers for state in inputs)
    apply_checkpointing(model, "none")
    outside = len(saved) - len(inputs)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.model(input_ids=IDS, use_cache=False)
    assert outside < 12 < 100 < len(saved)


def test_offloading_gives_the_same_gradients_on_the_host():
    model = tiny_model("gemma4")
    for policy in POLICIES:
        assert_same_gradients(model, policy, offload=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_offloaded_copies_give_the_same_gradients_and_leave_weights_alone(policy, monkeypatch):
    model = tiny_model("gemma4")
    copied = []
    monkeypatch.setattr(offloading, "_is_on_host", lambda tensor: copied.append(tensor) or False)  # copy all the same
    monkeypatch.setattr(offloading, "SMALLEST_BYTES", 0)
    assert_same_gradients(model, policy, offload=True)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert copied
    assert not any(tensor.data_ptr() in weights for tensor in copied)


def test_unknown_or_misfitting_policies_are_refused():
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="policy is 'some', expected one of none, keep_norm_inputs, full"):
        apply_checkpointing(model, "some")
    with pytest.raises(ValueError, match="3 checkpointing policies for 2 layers"):
        apply_checkpointing(model, ["full"] * 3)


def test_output_changed_in_place_is_refused_rather_than_wrong():
    model = tiny_model("olmoe")
    apply_checkpointing(model, "keep_norm_inputs")
    attention = decoder_layers(model)[0].self_attn
    attention.register_forward_hook(lambda *call: (call[-1][0].mul_(2), None))
    loss = loss_of(model.train())
    with pytest.raises(RuntimeError, match="changed the output of a block in place"):
        loss.backward()


def test_model_without_decoder_layers_is_refused():
    model = tiny_model("olmoe")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="no layers that transformers can checkpoint"):
        apply_checkpointing(model, "full")


def test_policy_in_the_arguments_trains_the_same_weights(checkpoints, tmp_path):
    weights = []
    settings = {None: False, "none": False, "keep_norm_inputs": "keep_norm_inputs", "auto": "full", True: "checkpoint"}
    for setting, expected in settings.items():
        model = packed_with_lora(checkpoints["qwen3_moe"])
        sft_trainer(model, tmp_path, max_steps=2, activation_checkpointing=setting).train()
        weights.append(adapter_weights(model))
        used = {layer.gradient_checkpointing and policies_of(layer) for layer in decoder_layers(model)}
        assert used == {expected}
        assert all(torch.equal(weights[-1][name], weight) for name, weight in weights[0].items())


def policies_of(layer):
    """Our policy of a layer, or the name of the function that transformers set."""
    function = layer._gradient_checkpointing_func
    return function.func.__name__ if isinstance(function, functools.partial) else function.policy


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing": True},
        {"activation_checkpointing": "full"},
    ],
    ids=str,
)
def test_steps_before_training_keep_no_more_than_those_of_training(checkpoints, tmp_path, setting):
    trainer = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, **setting)
    layers, passes = decoder_layers(trainer.model), []
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: passes.append(1))
    time_micro_batch(trainer)
    range_test(trainer, lambda: 0.0, [1e-3], steps=1, bound=1.0)
    assert len(passes) == 3 * 2 * len(layers)  # three micro-batches; what is not kept is computed again


@pytest.mark.parametrize(("every_n_layers", "checkpointed"), [(1, [True] * 3), (2, [True, False, True])])
def test_options_of_transformers_hold_before_training_too(checkpoints, tmp_path, every_n_layers, checkpointed):
    options = {"use_reentrant": False, "every_n_layers": every_n_layers}
    trainer = sft_trainer(
        packed_with_lora(checkpoints["qwen3_moe"]),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=options,
    )
    assert [layer.gradient_checkpointing for layer in decoder_layers(trainer.model)] == checkpointed
    assert trainer.args.gradient_checkpointing_kwargs == options


def test_plan_is_what_auto_stands_for(checkpoints, tmp_path):
    plan = ["full", "none", "keep_norm_inputs"]
    options = {
        "args": moeft.SFTConfig(**arguments(tmp_path, max_steps=1, activation_checkpointing="auto")),
        "train_dataset": sums(),
        "processing_class": tiny_tokenizer(),
    }
    model = packed_with_lora(checkpoints["qwen3_moe"])
    moeft.SFTTrainer(model=model, checkpoint_plan=plan, **options).train()
    assert [policies_of(layer) for layer in decoder_layers(model)] == plan
    with pytest.raises(ValueError, match="2 checkpointing policies for 3 layers"):
        moeft.SFTTrainer(model=model, checkpoint_plan=plan[:2], **options)
    options["args"] = moeft.SFTConfig(**arguments(tmp_path, activation_checkpointing="full"))
    with pytest.raises(ValueError, match="a checkpoint plan is for activation_checkpointing 'auto', which is 'full'"):
        moeft.SFTTrainer(model=model, checkpoint_plan=plan, **options)


def test_arguments_survive_a_copy_and_unknown_policies_are_refused(tmp_path):
    args = moeft.SFTConfig(**arguments(tmp_path, activation_checkpointing="keep_norm_inputs", activation_offload=True))
    again = dataclasses.replace(args, max_steps=2)
    assert (again.activation_checkpointing, again.gradient_checkpointing) == ("keep_norm_inputs", True)
    assert dataclasses.replace(again, activation_checkpointing="none").gradient_checkpointing is False
    with pytest.raises(
        ValueError, match="is 'ful', expected one of none, keep_norm_inputs, full, auto; did you mean 'full'"
    ):
        moeft.SFTConfig(**arguments(tmp_path, activation_checkpointing="ful"))
