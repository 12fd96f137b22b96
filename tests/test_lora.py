from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import moeft
from moeft.errors import AdapterError
from tests.test_quantizer import load, logits, with_rounded_weights
from tests.tiny_models import randomise_lora, save_tiny_model, token_ids


def with_lora(folder, targets=("attention", "experts"), rank=4, **options):
    model = load(folder, quantization_config=moeft.NF4Config())
    model = moeft.add_lora(model, rank, targets=targets, seed=0, **options)
    randomise_lora(model)
    return model


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("attention",), {}),
        (("experts",), {}),
        (("attention", "experts"), {"alpha": 7.0}),
        (("attention", "experts"), {"experts_rank": 2, "rslora": True}),
    ],
    ids=str,
)
def test_plain_peft_loads_the_adapter_and_gives_equal_logits(checkpoint, targets, options, tmp_path, recwarn):
    ours = with_lora(checkpoint, targets, **options)
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(with_rounded_weights(checkpoint, ours.get_base_model()), tmp_path)
    assert type(plain.base_model.model) is not type(ours)
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = {key.replace(".weight", ".default.weight") for key in file.keys()}  # noqa: SIM118
    assert keys == {name for name, _ in plain.named_parameters() if ".lora_" in name}
    expected = logits(plain)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (expected - logits(ours.get_base_model().eval() and disabled(ours))).abs().max() > 0.01


def disabled(model):
    """The same model without the effect of its adapter."""

    def call(**inputs):
        with model.disable_adapter():
            return model(**inputs)

    return call


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["no checkpointing", "reentrant", "not reentrant"])
def test_gradients_equal_those_of_plain_peft(checkpoint, reentrant, tmp_path):
    ours = with_lora(checkpoint)
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(
        with_rounded_weights(checkpoint, ours.get_base_model()), tmp_path, is_trainable=True
    )
    expected = gradients(plain, token_ids())
    if reentrant is not None:
        ours.enable_input_require_grads()
        ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(ours, token_ids()), expected)
    assert all(".lora_" in name for name in expected)


def test_adapter_made_by_plain_peft_loads_on_packed_experts(checkpoint, tmp_path):
    packed = load(checkpoint, quantization_config=moeft.NF4Config())
    plain = with_rounded_weights(checkpoint, packed)
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    plain = get_peft_model(plain, config)
    randomise_lora(plain)
    plain.save_pretrained(tmp_path)
    expected = logits(plain)
    ours = PeftModel.from_pretrained(packed, tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_one_stack_alone_can_be_adapted(checkpoint, stack, tmp_path):
    packed = load(checkpoint, quantization_config=moeft.NF4Config())
    plain = with_rounded_weights(checkpoint, packed)
    config = LoraConfig(r=3, target_modules=[], target_parameters=[f"experts.{stack}"])
    plain = get_peft_model(plain, config)
    randomise_lora(plain)
    plain.save_pretrained(tmp_path)
    expected = logits(plain)
    ours = logits(moeft.load_adapter(packed, tmp_path))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_reloaded_adapter_gives_identical_logits(checkpoint, tmp_path):
    ours = with_lora(checkpoint)
    ours.save_pretrained(tmp_path)
    again = moeft.load_adapter(load(checkpoint, quantization_config=moeft.NF4Config()), tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("reloaded", [False, True])
def test_saved_adapter_bears_layout_and_fingerprint(checkpoint, reloaded, tmp_path):
    model = with_lora(checkpoint)
    model.save_pretrained(tmp_path)
    if reloaded:
        packed = load(checkpoint, quantization_config=moeft.NF4Config())
        moeft.load_adapter(packed, tmp_path, trainable=True).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["moeft.base_fingerprint"] == moeft.checkpoint.fingerprint(checkpoint)
    assert metadata["moeft.layout"] == "peft-0.19.1"
    assert metadata["format"] == "pt"


def test_adapter_of_another_base_is_refused(checkpoints, tmp_path):
    with_lora(checkpoints["olmoe"]).save_pretrained(tmp_path / "adapter")
    other = save_tiny_model("olmoe", tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match="trained on a base with fingerprint"):
        moeft.load_adapter(load(other, quantization_config=moeft.NF4Config()), tmp_path / "adapter")


@pytest.mark.parametrize("operation", ["merge_and_unload", "merge_adapter"])
def test_merging_into_packed_weights_is_refused_not_ignored(checkpoint, operation):
    model = with_lora(checkpoint, targets=("experts",))
    with pytest.raises(AdapterError, match="moeft merge"):
        getattr(model, operation)()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 4, "targets": ("experts",), "experts_rank": -1}, ValueError, r"ranks\['experts'\] is -1"),
        ({"rank": 65}, ValueError, "rank is 65, but .* has only"),
        ({"rank": 4, "targets": ("expert",)}, ValueError, "targets is"),
        ({"rank": 4, "targets": ("mlp",)}, AdapterError, "'mlp' matches nothing"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(checkpoints, arguments, error, message):
    with pytest.raises(error, match=message):
        moeft.add_lora(load(checkpoints["mixtral"]), **arguments)


def test_unpacked_model_can_be_adapted_too(checkpoint, tmp_path):
    plain = moeft.add_lora(load(checkpoint), 4, targets=("attention", "experts"), seed=0)
    packed = with_lora(checkpoint)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in packed.named_parameters() if p.requires_grad
    }


def test_only_the_adapter_is_trainable(checkpoint):
    model = with_lora(checkpoint)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_generation_works_with_a_packed_model(checkpoints):
    model = with_lora(checkpoints["qwen3_moe"]).eval()
    out = model.generate(input_ids=token_ids(1, 4), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)
    assert isinstance(model.get_base_model(), AutoModelForCausalLM._model_mapping[type(model.config)])


@pytest.mark.parametrize("rslora", [False, True])
def test_experts_of_another_rank_keep_the_scale(checkpoints, rslora):
    model = with_lora(checkpoints["olmoe"], rank=8, alpha=6, experts_rank=2, rslora=rslora)
    scales = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert max(scales) - min(scales) < 1e-12
    assert min(scales) == pytest.approx(6 / (8**0.5 if rslora else 8))
