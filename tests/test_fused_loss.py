"""The fused loss against the loss that transformers computes from full logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import moeft
from moeft.errors import UnsupportedModelError
from moeft.integration.fused_loss import fuse_loss
from moeft.integration.log_probs import linear_head
from tests.tiny_models import randomise_lora, tiny_model, token_ids
from tests.tiny_training import TARGETS, load, losses, sft_trainer


def batch():
    """Two rows: one padded, both with tokens that do not count."""
    ids = token_ids(2, 24)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :5] = -100
    mask[1, 17:] = 0
    labels[1, 17:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prepared(checkpoint, kind):
    """A model to compare with its fused copy; "plain" trains all weights, its head too."""
    if kind == "plain":
        return load(checkpoint)
    model = load(checkpoint, quantization_config=moeft.NF4Config())
    if kind == "packed":
        return model.requires_grad_(False) and with_trainable_norms(model)
    model = moeft.add_lora(model, 4, targets=TARGETS, seed=0)
    randomise_lora(model)
    return model


def with_trainable_norms(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def loss_and_gradients(model, **inputs):
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_items", [None, 11], ids=["mean", "over 11 items"])
@pytest.mark.parametrize("kind", ["plain", "packed", "lora"])
def test_loss_and_gradients_equal_those_of_transformers(checkpoint, kind, num_items):
    model = prepared(checkpoint, kind)
    inputs = batch() | ({} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)})
    expected, theirs = loss_and_gradients(model, **inputs)
    assert fuse_loss(base_of(model))
    loss, ours = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, gradient in theirs.items():
        # Sums of a few hundred float32 products in another order: 1e-5 leaves a factor of ten over what is seen.
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_scaled_logits_give_the_loss_of_transformers():
    model = tiny_model("granitemoe")
    assert model.config.logits_scaling == 6
    expected, theirs = loss_and_gradients(model, **batch())
    assert fuse_loss(model)
    loss, ours = loss_and_gradients(model, **batch())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (ours[name] - theirs[name]).norm() < 1e-5 * theirs[name].norm()


def test_a_model_that_scales_its_logits_in_an_unknown_way_keeps_its_own_loss():
    model = tiny_model("llama")
    model.config.logit_scale = 0.25
    assert not fuse_loss(model)
    with pytest.raises(UnsupportedModelError, match="scaled in a way that moeft does not know"):
        linear_head(model)


def test_fused_model_returns_no_logits_with_labels_and_the_same_logits_without(checkpoint):
    model = load(checkpoint)
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = model(**inputs).logits
        fuse_loss(model)
        assert model(**inputs, labels=labels).logits is None
        assert torch.equal(model(**inputs).logits, expected)


def test_batch_without_a_counted_token_has_loss_and_gradients_of_zero(checkpoint):
    model = prepared(checkpoint, "lora")
    fuse_loss(base_of(model))
    inputs = batch()
    inputs["labels"].fill_(-100)
    loss, gradients = loss_and_gradients(model, **inputs)
    assert loss == 0
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_generation_is_that_of_the_model_before(checkpoint):
    model = load(checkpoint).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=token_ids(2, 6), **options)
    fuse_loss(model)
    assert torch.equal(model.generate(input_ids=token_ids(2, 6), **options), expected)


def test_fusing_twice_is_fusing_once(checkpoint):
    model = load(checkpoint)
    assert fuse_loss(model)
    forward = model.forward
    assert fuse_loss(model)
    assert model.forward is forward


def test_fused_forward_keeps_the_signature_that_trainer_inspects(checkpoint):
    model = load(checkpoint)
    expected = inspect.signature(model.forward)
    fuse_loss(model)
    assert inspect.signature(model.forward) == expected


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral"])
def test_model_with_a_router_loss_is_left_alone_and_trains(checkpoints, name, tmp_path):
    model = load(checkpoints[name], output_router_logits=True, quantization_config=moeft.NF4Config())
    untouched = model.forward
    model = moeft.add_lora(model, 4, targets=TARGETS, seed=0)
    trainer = sft_trainer(model, tmp_path, max_steps=8)
    assert not trainer.loss_is_fused
    assert model.get_base_model().forward == untouched
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_router_loss_asked_for_in_one_call_is_not_lost(checkpoints):
    model = load(checkpoints["qwen3_moe"])
    expected = model(**batch(), output_router_logits=True)
    fuse_loss(model)
    ours = model(**batch(), output_router_logits=True)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.aux_loss, expected.aux_loss)


def test_model_whose_head_is_not_plain_is_left_alone(checkpoints):
    model = load(checkpoints["olmoe"])
    plain = copy.deepcopy(model.lm_head)
    model.lm_head = torch.nn.Sequential(plain)
    assert not fuse_loss(model)
