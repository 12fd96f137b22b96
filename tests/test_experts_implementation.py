"""``experts_implementation="moeft"`` against transformers' own implementation and plain PEFT."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import moeft
from moeft.errors import AdapterError
from moeft.integration import experts_module, peft_lora
from tests.tiny_models import FAMILY_NAMES, randomise_lora, save_tiny_model, token_ids

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def load(folder, implementation, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=implementation).eval()


def with_lora(folder, implementation, parameters=STACKS):
    torch.manual_seed(3)
    config = LoraConfig(r=3, target_modules=["o_proj"], target_parameters=parameters)
    model = get_peft_model(load(folder, implementation), config)
    randomise_lora(model)
    return model


def run(model):
    """Logits, and every gradient of the loss."""
    model.zero_grad()
    out = model(input_ids=token_ids(), labels=token_ids())
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=token_ids()).logits


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < 5e-5, f"{name}: {error:.1e}"


def wrappers(model):
    return [m for m in model.modules() if isinstance(m, peft_lora.UnpackedParamWrapper)]


@pytest.fixture(scope="module", params=[*FAMILY_NAMES, "flex_olmo"])
def base(request, tmp_path_factory):
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_tiny_model("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def test_logits_and_gradients_with_an_adapter_equal_plain_peft(base):
    ours, plain = with_lora(base, "moeft"), with_lora(base, "eager")
    assert wrappers(ours)
    assert not wrappers(plain)
    assert_equal(run(ours), run(plain))


def test_frozen_experts_compute_what_transformers_computes(base):
    models = [load(base, implementation).requires_grad_(False) for implementation in ("moeft", "eager")]
    for model in models:
        model.get_input_embeddings().requires_grad_(True)
    assert_equal(*map(run, models))


@pytest.mark.parametrize("stack", STACKS)
def test_one_stack_alone_can_be_adapted(qwen, stack):
    assert_equal(run(with_lora(qwen, "moeft", [stack])), run(with_lora(qwen, "eager", [stack])))


def test_trainable_experts_get_their_gradients(qwen):
    ours, theirs = run(load(qwen, "moeft")), run(load(qwen, "eager"))
    assert any(name.endswith("experts.gate_up_proj") for name in ours)
    assert_equal(ours, theirs)


def test_training_experts_and_their_adapter_together_is_refused(qwen):
    model = with_lora(qwen, "moeft")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze one of the two"):
        run(model)


def test_no_delta_of_the_size_of_a_stack_is_kept(qwen):
    sizes = {}
    for implementation in ("moeft", "grouped_mm"):
        model, saved = with_lora(qwen, implementation), []
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        stack = min(m.down_proj.numel() for m in model.modules() if experts_module.is_fused(m))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            model(input_ids=token_ids(1, 8), labels=token_ids(1, 8))
        sizes[implementation] = max(t.numel() for t in saved if t.ndim == 3 and t.data_ptr() not in frozen)
    assert sizes["moeft"] < stack <= sizes["grouped_mm"]


def test_adapter_goes_to_plain_peft_and_merges(qwen, tmp_path):
    ours = moeft.add_lora(load(qwen, "moeft"), 3, targets=("attention", "experts"), seed=0)
    randomise_lora(ours)
    expected = logits(ours)
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(qwen, "eager"), tmp_path).eval()
    assert not wrappers(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_adapter_follows_when_the_implementation_is_changed(qwen):
    model = with_lora(qwen, "moeft")
    expected = run(model)
    model.get_base_model().set_experts_implementation("eager")
    assert_equal(run(model), expected)
    model.get_base_model().set_experts_implementation("moeft")
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(load(qwen, "eager")), rtol=1e-4, atol=1e-4)


def test_bf16_stays_as_close_to_float32_as_transformers_does(qwen):
    exact = logits(load(qwen, "eager"))
    ours, theirs = (logits(load(qwen, implementation, torch.bfloat16)) for implementation in ("moeft", "eager"))
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("imports", ["moeft, transformers, peft", "peft, transformers, moeft"])
def test_it_is_registered_whatever_is_imported_first(qwen, imports):
    code = f"""
import {imports}
model = transformers.AutoModelForCausalLM.from_pretrained({str(qwen)!r}, experts_implementation="moeft")
model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["experts.down_proj"]))
assert "UnpackedParamWrapper" in {{type(m).__qualname__ for m in model.modules()}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options",
    [{"experts_implementation": "moeft"}, {"quantization_config": moeft.NF4Config()}],
    ids=["16 bit", "packed"],
)
def test_adapter_on_biases_of_experts_is_refused_by_name(checkpoints, options):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj_bias"])
    with pytest.raises(AdapterError, match=r"names gate_up_proj_bias of .*only gate_up_proj and down_proj of experts"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoints["gpt_oss"], **options), config)
