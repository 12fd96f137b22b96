"""Options of ``add_lora``: ranks by target, layers, experts, dropout. Oracle: plain PEFT loads what they save."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import moeft
from moeft.config.ranges import expand
from moeft.errors import AdapterError
from tests.test_lora import with_lora
from tests.test_quantizer import load, logits, with_rounded_weights
from tests.tiny_models import token_ids


def scales(model):
    return {
        name: m.scaling["default"] for name, m in model.named_modules() if isinstance(getattr(m, "scaling", 0), dict)
    }


def loaded_by_plain_peft(ours, checkpoint, folder):
    ours.save_pretrained(folder)
    return PeftModel.from_pretrained(with_rounded_weights(checkpoint, ours.get_base_model()), folder)


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": {"experts": 3, "experts.down_proj": 5, "attention.q_proj": 2}, "alpha": 6.0},
        {"ranks": {"experts.gate_up_proj": 2}, "alphas": {"experts": 9.0, "attention.o_proj": 1.0}, "rslora": True},
        {"layers": [0, "2-2"]},
        {"layers": ["0-0"], "experts": [0, "2-3"], "ranks": {"experts": 2}},
    ],
    ids=str,
)
def test_plain_peft_reads_every_option(checkpoints, options, tmp_path):
    checkpoint = checkpoints["gemma4"]
    ours = with_lora(checkpoint, **options)
    plain = loaded_by_plain_peft(ours, checkpoint, tmp_path)
    assert scales(plain) == scales(ours)
    expected = logits(plain)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_ranks_and_scales_are_those_asked_for(checkpoints, tmp_path):
    model = with_lora(
        checkpoints["qwen3_moe"],
        rank=4,
        alpha=8,
        ranks={"experts": 2, "experts.down_proj": 6},
        alphas={"attention.q_proj": 3.0},
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 6}
    assert config["alpha_pattern"]["self_attn.q_proj"] == 3.0
    factors = load_file(tmp_path / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.0.mlp.experts"
    assert factors[f"{experts}.base_layer.lora_A.weight"].shape[0] == 5 * 2
    assert factors[f"{experts}.lora_B.weight"].shape[1] == 5 * 6
    found = {name.rpartition("layers.0.")[2]: scale for name, scale in scales(model).items() if "layers.0." in name}
    assert found["self_attn.q_proj"] == 3 / 4
    assert {scale for name, scale in found.items() if name != "self_attn.q_proj"} == {2.0}


def test_only_the_chosen_layers_have_factors(checkpoints):
    model = with_lora(checkpoints["gemma4"], layers=["1-2"])
    adapted = {name.partition("layers.")[2][0] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"1", "2"}


def by_expert(name, factor, num_experts=5):
    if "lora_A" in name:
        return factor.view(num_experts, -1, factor.shape[1])
    return factor.view(factor.shape[0], -1, num_experts).permute(2, 0, 1)


@pytest.mark.parametrize("experts", [[1, "3-4"], {0: [2], 2: [0, 4]}], ids=["everywhere", "by layer"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_an_expert_that_is_not_chosen_never_changes(checkpoints, experts, packed):
    """Zero stays zero through AdamW with weight decay, and every chosen expert that gets tokens learns."""
    options = {"quantization_config": moeft.NF4Config()} if packed else {}
    model = load(checkpoints["qwen3_moe"], **options)
    model = moeft.add_lora(model, 3, targets=("experts",), experts=experts, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        model(input_ids=token_ids(seed=step), labels=token_ids(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = int(name.partition("layers.")[2][0])
        chosen = [1, 3, 4] if isinstance(experts, list) else experts[layer]
        after, start = (by_expert(name, value) for value in (parameter.detach(), before[name]))
        for expert in range(5):
            assert bool(after[expert].any()) == (expert in chosen), (name, expert)
            assert torch.equal(after[expert], start[expert]) == (expert not in chosen), (name, expert)


def test_chosen_experts_of_all_layers_equal_the_whole_adapter(checkpoints):
    whole, every = (with_lora(checkpoints["olmoe"], experts=experts) for experts in ("all", ["0-4"]))
    assert torch.equal(logits(whole), logits(every))


def test_dropout_reaches_attention(checkpoints):
    model = with_lora(checkpoints["olmoe"], targets=("attention",), dropout=0.5).train()
    ids = token_ids()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 2.5}, ValueError, "rank is 2.5, expected a positive whole number"),
        ({"alpha": 0}, ValueError, "alpha is 0, expected a positive number"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"alphas": {"experts": -1}}, ValueError, r"alphas\['experts'\] is -1"),
        ({"ranks": {"experts": 30}}, ValueError, "rank is 30, but .*down_proj has only 20 rows or columns"),
        ({"ranks": {"experts.down": 2}}, ValueError, r"'experts.down', expected .* did you mean 'experts.down_proj'"),
        ({"ranks": {"mlp": 2}}, ValueError, "'mlp', expected a target or a weight of one: attention"),
        ({"experts_rank": 2, "ranks": {"experts": 3}}, ValueError, "give one of them"),
        ({"targets": ("atention",)}, ValueError, r"targets is \('atention',\).* did you mean 'attention'"),
        ({"targets": ()}, ValueError, "targets is empty"),
        ({"layers": [7]}, ValueError, "layers names 7, but the last layer with a target is 2"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": ["3-1"]}, ValueError, "runs backwards; write '1-3'"),
        ({"layers": [-1]}, ValueError, "layers holds -1"),
        ({"layers": [1]}, AdapterError, r"'experts' matches nothing in layers \[1\]; it is in layers \[0, 2\]"),
        ({"experts": [5]}, ValueError, "experts names 5, but layer 0 has the experts 0 to 4"),
        ({"experts": {1: [0]}}, ValueError, r"layer 1, but the adapter changes experts in layers \[0, 2\]"),
        ({"experts": [0], "targets": ("attention",)}, ValueError, "add 'experts' to it"),
        ({"dropout": 0.1}, ValueError, "dropout is 0.1, expected 0 with experts: an expert's delta"),
        ({"dropout": 1.0, "targets": ("attention",)}, ValueError, "dropout is 1.0, expected a share"),
        ({"name": "a.b"}, ValueError, "name is 'a.b'"),
    ],
    ids=str,
)
def test_bad_option_is_named(checkpoints, options, error, message):
    arguments = {"rank": 4, "targets": ("attention", "experts"), **options}
    with pytest.raises(error, match=message):
        moeft.add_lora(load(checkpoints["qwen3_moe"]), **arguments)


@pytest.mark.parametrize(
    ("numbers", "expected"), [([3, 1, 1], (1, 3)), (["0-2", 5], (0, 1, 2, 5)), ("4-5", (4, 5)), (range(2), (0, 1))]
)
def test_ranges_expand(numbers, expected):
    assert expand(numbers, "layers") == expected
