"""Streamed experts: the same losses and gradients as resident ones, whatever is run in between."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

import moeft
from moeft.errors import UnsupportedModelError
from moeft.integration.checkpointing import POLICIES, apply_checkpointing
from moeft.integration.streaming import spread, stream_experts
from moeft.modules import NF4Experts
from moeft.training.frozen_base import FrozenBase
from tests.test_mapped_files import resident_bytes
from tests.tiny_models import FAMILY_NAMES, randomise_lora, tiny_model, token_ids
from tests.tiny_training import frozen_hash, load, losses, packed_with_lora, sft_trainer

IDS = token_ids(2, 24)


def tuned(folder):
    model = packed_with_lora(folder)
    randomise_lora(model)
    return model.train()


def gradients(model, ids=IDS):
    """Loss, and gradients by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_losses_and_gradients_are_the_same_bits_in_every_family(checkpoints, family):
    model = tuned(checkpoints[family])
    expected = gradients(model)
    stream = stream_experts(model, "cpu")
    assert_same(gradients(model), expected)
    assert stream.ring.traffic.borrowed == 2 * stream.layers


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("resident", [0, 1])
@pytest.mark.parametrize("backing", ["host", "disk"])
def test_checkpointing_and_resident_layers_change_no_bit(checkpoints, policy, resident, backing):
    model = tuned(checkpoints["gemma4"])
    apply_checkpointing(model, policy)
    expected = gradients(model)
    stream = stream_experts(model, "cpu", resident, backing)
    for _ in range(2):
        assert_same(gradients(model), expected)
    assert len(stream.resident) == resident
    assert stream.ring.traffic.late == 1


@pytest.mark.parametrize("kernels", ["pytorch", "reference"])
def test_other_kernels_stream_too(checkpoints, monkeypatch, kernels):
    monkeypatch.setenv("MOEFT_KERNELS", kernels)
    model = tuned(checkpoints["gpt_oss"])
    expected = gradients(model)
    stream_experts(model, "cpu")
    assert_same(gradients(model), expected)


def test_evaluation_and_an_exception_between_micro_batches_change_no_bit(checkpoints):
    model = tuned(checkpoints["gemma4"])
    apply_checkpointing(model, "full")
    batches = [token_ids(2, 24, seed) for seed in range(3)]
    stream = None

    def accumulate(disturbed):
        model.zero_grad()
        for ids in batches:
            if disturbed:
                with torch.no_grad():
                    model(input_ids=IDS, use_cache=False)
                layer = model.get_decoder().layers[1].experts
                hook = layer.register_forward_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(input_ids=IDS, use_cache=False)
                hook.remove()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.zeros(()), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = accumulate(disturbed=False)
    stream = stream_experts(model, "cpu")
    assert_same(accumulate(disturbed=True), expected)
    assert not any(slot.users for slot in stream.ring._slots)


def test_moving_and_casting_the_model_leaves_streamed_experts_alone(checkpoints):
    model = load(checkpoints["gpt_oss"], quantization_config=moeft.NF4Config(double_quant=True))
    stream = stream_experts(model, "cpu", resident=1)
    streamed, resident = (
        stream.modules[0],
        next(m for m in model.modules() if isinstance(m, NF4Experts) and not m.lender),
    )
    before = [streamed.packed_weight(name) for name in ("gate_up_proj", "down_proj")]
    model.to(torch.bfloat16).to("meta")
    assert streamed.gate_up_proj.device.type == streamed.down_proj_nested_absmax.device.type == "cpu"
    assert streamed.gate_up_proj_bias.device.type == "meta"  # small, and computed with where the tokens are
    assert resident.gate_up_proj.device.type == "meta"
    for weight, name in zip(before, ("gate_up_proj", "down_proj"), strict=True):
        assert torch.equal(streamed.packed_weight(name).packed, weight.packed)
        assert torch.equal(streamed.packed_weight(name).nested.absmax, weight.nested.absmax)


def test_training_and_its_adapter_are_the_same(checkpoints, tmp_path):
    runs = []
    for name in ("plain", "streamed"):
        model = packed_with_lora(checkpoints["qwen3_moe"])
        base = frozen_hash(model)
        if name == "streamed":
            stream_experts(model, "cpu")
        trainer = sft_trainer(model, tmp_path / name, max_steps=3, gradient_accumulation_steps=2)
        trainer.train()
        model.save_pretrained(tmp_path / name)
        assert frozen_hash(model) == base
        runs.append((losses(trainer), (tmp_path / name / "adapter_model.safetensors").read_bytes()))
    assert runs[0] == runs[1]


def test_a_closed_stream_leaves_a_model_that_computes_the_same(checkpoints):
    model = tuned(checkpoints["olmoe"])
    expected = gradients(model)
    stream = stream_experts(model, "cpu")
    gradients(model)
    stream.close()
    assert_same(gradients(model), expected)
    assert_same(gradients((stream_experts(model, "cpu"), model)[1]), expected)


def test_streamed_model_saves_the_checkpoint_it_came_from(checkpoints, tmp_path):
    model = load(checkpoints["mixtral"], quantization_config=moeft.NF4Config())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream_experts(model, "cpu")
    model.save_pretrained(tmp_path)
    for name, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose /proc tells what is resident")
def test_pages_of_a_packed_checkpoint_are_given_back_as_layers_pass(tmp_path):
    model = tiny_model("gemma4")
    config = model.config
    config.num_experts, config.moe_intermediate_size = 32, 512
    large = type(model)(config)
    large.save_pretrained(tmp_path / "base")
    del large
    moeft.checkpoint.quantize(tmp_path / "base", tmp_path / "packed")
    packed, _ = moeft.load(tmp_path / "packed", dtype="float32")
    stream = stream_experts(packed, "cpu", backing="disk")
    layer = stream.ring.slot_bytes
    with torch.no_grad():
        for _ in range(2):
            packed(input_ids=IDS, use_cache=False)
    FrozenBase()._hash(packed)  # reads everything too
    stream.ring.close()  # no copy is in flight any more
    experts = 3 * layer
    others = sum(p.nbytes for name, p in packed.named_parameters() if ".experts." not in name)
    assert resident_bytes(tmp_path / "packed") < others + 0.1 * experts
    assert stream.host_bytes == 0
    gc.collect()


def test_tokens_on_another_device_are_refused(checkpoints):
    model = load(checkpoints["olmoe"], quantization_config=moeft.NF4Config())
    stream = stream_experts(model, "cpu")
    tokens = torch.zeros(4, 64, device="meta")
    index, weights = torch.zeros(4, 2, dtype=torch.int64, device="meta"), torch.zeros(4, 2, device="meta")
    with pytest.raises(ValueError, match="the stream of experts is on cpu, but x on meta"):
        stream.modules[0](tokens, index, weights)


def test_what_cannot_be_streamed_is_named(checkpoints):
    with pytest.raises(UnsupportedModelError, match="no packed experts to stream; load it with"):
        stream_experts(tiny_model("olmoe"), "cpu")
    model = load(checkpoints["olmoe"], quantization_config=moeft.NF4Config())
    with pytest.raises(UnsupportedModelError, match="streamed to a CUDA GPU or the CPU, not to mps"):
        stream_experts(model, "mps")
    with pytest.raises(ValueError, match="resident is 2, expected 0 to 1 of 2 layers"):
        stream_experts(model, "cpu", resident=2)
    with pytest.raises(ValueError, match="backing is 'tape', expected one of host, disk"):
        stream_experts(model, "cpu", backing="tape")
    stream_experts(model, "cpu")
    with pytest.raises(ValueError, match="streamed already"):
        stream_experts(model, "cpu")
    with pytest.raises(ValueError, match="experts lie on meta, expected host memory"):
        stream_experts(load(checkpoints["olmoe"], quantization_config=moeft.NF4Config()).to("meta"), "cpu")


@pytest.mark.parametrize("count", range(8))
def test_resident_layers_are_spread_evenly(count):
    numbers = spread(count, 30)
    assert len(set(numbers)) == count
    gaps = [b - a for a, b in zip((-1, *numbers), (*numbers, 30), strict=True)]
    assert not numbers or max(gaps[1:-1], default=0) - min(gaps[1:-1], default=0) <= 1
