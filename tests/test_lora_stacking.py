"""Several active adapters on one model. Oracle: plain PEFT with the same adapters active, or merged into the base."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import moeft
from moeft.errors import AdapterError
from moeft.merging import merge
from tests.test_lora import assert_same_gradients, gradients
from tests.test_quantizer import load, logits, with_rounded_weights
from tests.tiny_models import randomise_lora, token_ids

BOTH = ("attention", "experts")


def stacked(folder, first, second, packed=True, **options):
    """A model with two active adapters whose factors are random."""
    model = load(folder, **({"quantization_config": moeft.NF4Config()} if packed else {}))
    model = moeft.add_lora(model, 4, targets=first, seed=0)
    model = moeft.add_lora(model, 2, 3.0, targets=second, name="second", seed=1, **options)
    randomise_lora(model)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder, folder / "second"


def in_plain_peft(model, folders):
    plain = PeftModel.from_pretrained(model, folders[0])
    plain.load_adapter(folders[1], "second")
    plain.base_model.set_adapter(["default", "second"])
    return plain


@pytest.mark.parametrize(
    ("first", "second"), [(("attention",), ("experts",)), (BOTH, BOTH)], ids=["attention, experts", "both on both"]
)
def test_two_active_adapters_compute_and_train_as_in_plain_peft(checkpoint, first, second, tmp_path):
    ours = stacked(checkpoint, first, second)
    plain = in_plain_peft(with_rounded_weights(checkpoint, ours.get_base_model()), saved(ours, tmp_path))
    expected = logits(plain)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    ours.base_model.set_adapter(["default", "second"])  # PEFT lets all that are active train
    assert_same_gradients(gradients(ours, token_ids()), gradients(plain, token_ids()))


def test_adapters_that_scale_alike_or_not_are_both_exact(checkpoints):
    """The delta of the pair is the sum of the deltas."""
    model = stacked(checkpoints["gemma4"], BOTH, BOTH)
    wrapper = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    a, b, scaling = wrapper.factors()
    num_experts = wrapper.num_experts
    expected = sum(wrapper.get_delta_weight(name) for name in ("default", "second"))
    delta = torch.einsum("ore,eri->eoi", b.view(b.shape[0], -1, num_experts), a.view(num_experts, -1, a.shape[1]))
    torch.testing.assert_close(delta * scaling, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_only_the_new_adapter_trains_and_the_first_stays_active(checkpoints):
    model = stacked(checkpoints["olmoe"], BOTH, BOTH)
    assert model.active_adapters == ["default", "second"]
    found = gradients(model, token_ids())
    assert found
    assert all(".second." in name for name in found)


def test_a_disabled_model_is_the_base(checkpoints):
    model = stacked(checkpoints["olmoe"], BOTH, BOTH)
    expected = logits(load(checkpoints["olmoe"], quantization_config=moeft.NF4Config()))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_reloaded_stack_gives_identical_logits(checkpoints, tmp_path):
    ours = stacked(checkpoints["qwen3_moe"], ("attention",), ("experts",), layers=[2])
    first, second = saved(ours, tmp_path)
    again = load(checkpoints["qwen3_moe"], quantization_config=moeft.NF4Config())
    again = moeft.load_adapter(moeft.load_adapter(again, first), second, name="second", trainable=True)
    assert torch.equal(logits(again), logits(ours))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in ours.named_parameters() if p.requires_grad
    }


def test_merging_both_into_the_base_equals_both_active(checkpoint, tmp_path):
    ours = stacked(checkpoint, ("attention",), BOTH, packed=False)
    folders = saved(ours, tmp_path / "adapters")
    models = [{"adapter": folder} for folder in folders]
    merge({"merge_method": "lora", "base_model": checkpoint, "models": models}, tmp_path / "out", progress=False)
    expected = logits(ours)
    merged = logits(load(tmp_path / "out"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_short_target_names_of_plain_peft_are_the_same_stacks(checkpoints, tmp_path):
    base = load(checkpoints["mixtral"], quantization_config=moeft.NF4Config())
    config = LoraConfig(r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    plain = get_peft_model(with_rounded_weights(checkpoints["mixtral"], base), config)
    randomise_lora(plain)
    plain.save_pretrained(tmp_path)
    stack = moeft.add_lora(moeft.load_adapter(base, tmp_path), 2, targets=("experts",), name="second")
    torch.testing.assert_close(logits(stack), logits(plain), rtol=1e-4, atol=1e-4)  # the second one is still zero
    other = moeft.add_lora(load(checkpoints["mixtral"]), 2, targets=("experts",))
    moeft.load_adapter(other, tmp_path, name="second")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "default"}, ValueError, "name is 'default', but the model has adapters default"),
        ({"name": "second", "layers": [0]}, AdapterError, "PEFT needs the same stacks in both"),
    ],
    ids=str,
)
def test_adapter_that_cannot_be_stacked_is_refused(checkpoints, options, error, message):
    model = moeft.add_lora(load(checkpoints["olmoe"]), 2, targets=("experts",))
    with pytest.raises(error, match=message):
        moeft.add_lora(model, 2, targets=("experts",), **options)
