"""``moeft sft`` with chosen experts, and on top of an earlier adapter. Oracle: plain PEFT with both adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import moeft
from moeft.config import SftRecipe
from moeft.errors import RecipeError
from moeft.runs.sft import run
from tests.test_runs_sft import base, start, write_recipe  # noqa: F401  (base is a fixture)
from tests.tiny_models import token_ids
from tests.tiny_training import adapter_weights, load, sft_trainer


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("first")
    return start(write_recipe(folder, base, lora={"targets": ["attention"]})).path / "adapter"


def test_second_adapter_on_a_first_merges_to_what_both_compute(base, first, tmp_path):  # noqa: F811
    lora = {"targets": ["experts"], "rank": 2, "alpha": 3.0, "stack_on": [str(first)]}
    path = write_recipe(tmp_path, base, lora=lora, merge={"output": str(tmp_path / "merged"), "out_dtype": "float32"})
    before = load_file(first / "adapter_model.safetensors")
    folder = start(path)
    metrics = folder.read_json("metrics.json")
    assert metrics["heldout"]["after"]["loss"] < metrics["heldout"]["before"]["loss"]
    assert all(torch.equal(value, before[key]) for key, value in load_file(first / "adapter_model.safetensors").items())
    second = folder.path / "adapter"
    assert {".experts." in key for key in load_file(second / "adapter_model.safetensors")} == {True}
    plain = PeftModel.from_pretrained(load(base), first, "below")
    plain.load_adapter(second, "default")
    plain.base_model.set_adapter(["below", "default"])
    expected = logits(plain)
    merged = logits(load(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    alone = logits(PeftModel.from_pretrained(load(base), second))
    assert (expected - alone).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_training_of_a_stack_ends_with_identical_weights(base, first, dtype, tmp_path):  # noqa: F811
    def stack():
        below = moeft.load_adapter(load(base, quantization_config=moeft.NF4Config()), first, name="below_0")
        return moeft.add_lora(below, 2, targets=("experts",), seed=0, dtype=dtype)

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = sft_trainer(stack(), tmp_path, **options)
    whole.train()
    resumed = sft_trainer(stack(), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.model.active_adapters == ["below_0", "default"]
    expected = adapter_weights(whole.model)
    assert expected
    assert all(".default." in name for name in expected)
    assert adapter_weights(resumed.model).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed.model).items())


def test_run_adapts_only_the_experts_that_its_rows_are_routed_to(base, tmp_path):  # noqa: F811
    shown = []
    routing = {"experts": "routed", "routing": {"rows": 3, "min_share": 0.2}, "layers": [2]}
    path = write_recipe(tmp_path, base, lora={"targets": ["experts"], "rank": 2, **routing}, training={"max_steps": 2})
    folder = run(SftRecipe.load(path), show=shown.append)
    counts = folder.read_json("metrics.json")["routing"]["counts"]
    assert list(counts) == ["0", "2"]
    chosen = {expert for expert, count in enumerate(counts["2"]) if count >= 0.2 * sum(counts["2"])}
    assert 0 < len(chosen) < 5
    assert any("layer  experts  chosen" in text for text in shown)
    for key, factor in load_file(folder.path / "adapter" / "adapter_model.safetensors").items():
        assert "layers.2." in key
        by_expert = factor.view(5, -1) if "lora_A" in key else factor.view(factor.shape[0], 2, 5).permute(2, 0, 1)
        assert {expert for expert in range(5) if by_expert[expert].any()} == chosen, key


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"dropout": 0.1}, "lora.dropout: found 0.1, expected 0 with experts"),
        ({"ranks": {"expert": 4}}, "lora.ranks: found .*expected keys such as experts"),
        ({"ranks": {"experts": 0}}, "lora.ranks.experts: found 0"),
        ({"layers": ["4-2"]}, "lora.layers: found .*runs backwards"),
        ({"experts": "some"}, "lora.experts"),
        ({"alpha": 0}, "lora.alpha: found 0"),
    ],
    ids=str,
)
def test_bad_value_of_the_section_is_named(tmp_path, lora, message):
    path = write_recipe(tmp_path, tmp_path / "base", lora=lora)
    with pytest.raises(RecipeError, match=message):
        SftRecipe.load(path)


def test_proving_a_stack_is_refused_before_training(base, first, tmp_path):  # noqa: F811
    merge = {"output": str(tmp_path / "merged"), "verify": True}
    path = write_recipe(tmp_path, base, lora={"stack_on": [str(first)]}, merge=merge)
    with pytest.raises(RecipeError, match=r"set merge\.verify to false"):
        start(path)
