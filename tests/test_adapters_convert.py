"""``moeft.adapters.convert``. Oracles: PEFT's merged weights, safetensors' reader, the same bits after a way back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moeft
from moeft.adapters import Layout, convert, verify
from moeft.adapters.layout import split
from moeft.errors import AdapterError
from moeft.merging import merge
from tests.tiny_checkpoints import EXPERTS, disk_tensors, save_adapter, save_base

WEIGHTS = "adapter_model.safetensors"
FAMILIES = ("gemma4", "qwen3_moe", "olmoe", "mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Base and adapter of each family."""
    root = tmp_path_factory.mktemp("saved")
    bases = {family: save_base(root / family / "base", family, torch.float32) for family in FAMILIES}
    return {family: (base, save_adapter(root / family / "adapter", base)) for family, base in bases.items()}


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


def edited(adapter, folder, tensors=None, **changes):
    copy = shutil.copytree(adapter, folder)
    (copy / "adapter_config.json").write_text(json.dumps(config_of(adapter) | changes))
    if tensors is not None:
        save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    return copy


def peft_merged(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def same(left, right):
    a, b = disk_tensors(left), disk_tensors(right)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_file(saved, family, layout, tmp_path):
    base, adapter = saved[family]
    assert convert(adapter, tmp_path / "there", layout) is Layout.PEFT
    assert verify(tmp_path / "there").layout is layout
    assert convert(tmp_path / "there", tmp_path / "back", "peft") is layout
    assert same(adapter, tmp_path / "back")
    assert same(adapter, tmp_path / "there") == (layout is Layout.PEFT)
    merge(
        {"merge_method": "lora", "base_model": base, "models": [{"adapter": tmp_path / "back"}]},
        tmp_path / "merged",
        progress=False,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name, expected in peft_merged(base, adapter).items():
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_experts_have_the_deltas_of_peft(saved, family, tmp_path):
    """Each pair of factors of one expert's projection, by vLLM's name, gives that part of PEFT's own delta."""
    base, adapter = saved[family]
    convert(adapter, tmp_path / "vllm", "vllm")
    factors = disk_tensors(tmp_path / "vllm")
    config = config_of(tmp_path / "vllm")
    scale = config["lora_alpha"] / config["r"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    w1, w3, w2 = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    module = {"gemma4": "moe.experts", "mixtral": "block_sparse_moe.experts"}.get(family, "mlp.experts")
    wrappers = [m for m in plain.modules() if type(m).__name__ == "ParamWrapper"]
    compared = 0
    for layer in range(3):
        for wrapper in wrappers:
            prefix = f"base_model.model.model.layers.{layer}."
            name = next(n for n, m in plain.named_modules() if m is wrapper)
            if not name.startswith(prefix):
                continue
            delta = wrapper.get_delta_weight("default")
            for expert in range(delta.shape[0]):
                parts = {w2: delta[expert]}
                if wrapper.parameter_name == "gate_up_proj":
                    parts = dict(zip((w1, w3), delta[expert].chunk(2), strict=True))
                for projection, expected in parts.items():
                    a, b = (factors[f"{prefix}{module}.{expert}.{projection}.lora_{f}.weight"] for f in "AB")
                    torch.testing.assert_close(b @ a * scale, expected, rtol=0, atol=1e-6)
                    compared += 1
    assert compared == sum(1 for key in factors if ".experts." in key) / 2
    assert sorted(config["target_modules"]) == sorted({"q_proj", "k_proj", "o_proj", w1, w2, w3})
    assert config["target_parameters"] is None


def test_gate_and_up_with_factors_of_their_own_become_blocks(saved, tmp_path):
    """Twice the rank, the same deltas, and back to the same bits."""
    base, adapter = saved["qwen3_moe"]
    convert(adapter, tmp_path / "shared", "vllm")
    factors = disk_tensors(tmp_path / "shared")
    torch.manual_seed(7)
    factors |= {key: torch.randn_like(value) for key, value in factors.items() if "up_proj.lora_A" in key}
    own = edited(tmp_path / "shared", tmp_path / "own", factors)
    convert(own, tmp_path / "stacked", "peft")
    stacked = disk_tensors(tmp_path / "stacked")
    config = config_of(tmp_path / "stacked")
    name = "model.layers.2.mlp.experts"
    assert config["rank_pattern"] == {f"model.layers.{layer}.mlp.experts.gate_up_proj": 8 for layer in (0, 2)}
    pair = (stacked[f"base_model.model.{name}.base_layer.lora_{factor}.weight"] for factor in "AB")
    a, b = split(Layout.PEFT, *pair, 5)
    for expert in range(5):
        single = {key.rpartition("experts.")[2]: value for key, value in factors.items() if f"{name}.{expert}." in key}
        expected = [
            single[f"{expert}.{part}.lora_B.weight"] @ single[f"{expert}.{part}.lora_A.weight"]
            for part in ("gate_proj", "up_proj")
        ]
        torch.testing.assert_close(b[expert] @ a[expert], torch.cat(expected), rtol=0, atol=1e-5)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "stacked")
    assert {m.scaling["default"] for m in plain.modules() if isinstance(getattr(m, "scaling", 0), dict)} == {1.5}
    convert(tmp_path / "stacked", tmp_path / "again", "vllm")
    assert same(own, tmp_path / "again")
    assert config_of(tmp_path / "again")["r"] == 4


def test_ranks_of_their_own_survive(saved, tmp_path):
    """Equal scales with other ranks: what `add_lora(ranks=...)` saves."""
    base, _ = saved["olmoe"]
    ranks, alphas = {"experts.down_proj": 2, "q_proj": 6}, {"experts.down_proj": 3, "q_proj": 9}
    adapter = save_adapter(tmp_path / "adapter", base, rank_pattern=ranks, alpha_pattern=alphas)
    convert(adapter, tmp_path / "vllm", "vllm")
    config = config_of(tmp_path / "vllm")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 9, {})
    convert(tmp_path / "vllm", tmp_path / "back", "peft")
    assert same(adapter, tmp_path / "back")
    expected = peft_merged(base, adapter)
    for name, value in peft_merged(base, tmp_path / "back").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("targets", [EXPERTS[:1], EXPERTS[1:]], ids=["gate-up", "down"])
def test_one_stack_alone_goes_through_single_experts(saved, targets, tmp_path):
    base, _ = saved["mixtral"]
    adapter = save_adapter(tmp_path / "adapter", base, target_parameters=targets)
    convert(adapter, tmp_path / "vllm", "vllm")
    convert(tmp_path / "vllm", tmp_path / "back", "peft")
    assert same(adapter, tmp_path / "back")


def test_bf16_factors_and_other_files_come_along(saved, tmp_path):
    _, adapter = saved["gemma4"]
    narrow = edited(adapter, tmp_path / "narrow", {k: v.bfloat16() for k, v in disk_tensors(adapter).items()})
    (narrow / "chat_template.jinja").write_text("{{ x }}")
    convert(narrow, tmp_path / "old", "unsloth018")
    convert(tmp_path / "old", tmp_path / "back", "peft")
    assert same(narrow, tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ x }}"
    assert config_of(tmp_path / "old")["lora_B_layout"] == "grouped_by_expert"
    assert "lora_B_layout" not in config_of(tmp_path / "back")


@pytest.mark.parametrize("layout", [Layout.PEFT018, Layout.UNSLOTH, Layout.UNSLOTH018, Layout.VLLM])
def test_other_layouts_are_neither_merged_nor_loaded(saved, layout, tmp_path):
    base, adapter = saved["gemma4"]
    convert(adapter, tmp_path / "other", layout)
    recipe = {"merge_method": "lora", "base_model": base, "models": [{"adapter": tmp_path / "other"}]}
    with pytest.raises(AdapterError, match="moeft adapter convert --to peft"):
        merge(recipe, tmp_path / "out", progress=False)
    with pytest.raises(AdapterError, match=f"is in layout {layout}; .*moeft adapter convert --to peft"):
        moeft.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "other")


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"lora_B_layout": "grouped_by_expert"}, 'lora_B_layout is "grouped_by_expert"'),
        ({"auto_mapping": {"unsloth_fixed": True}}, "unsloth wrote it without lora_B_layout"),
        ({"base_model_name_or_path": "unsloth/gemma"}, "unsloth wrote it without lora_B_layout"),
        ({"auto_mapping": {"unsloth_fixed": True}, "lora_B_layout": "rank_major"}, None),
    ],
    ids=str,
)
def test_columns_in_an_order_that_nothing_tells_are_not_merged(saved, marks, message, tmp_path):
    base, adapter = saved["gemma4"]
    marked = edited(adapter, tmp_path / "marked", **marks)
    recipe = {"merge_method": "lora", "base_model": base, "models": [{"adapter": marked}]}
    if message is None:
        merge(recipe, tmp_path / "out", progress=False)
        return
    with pytest.raises(AdapterError, match=message):
        merge(recipe, tmp_path / "out", progress=False)
    convert(marked, tmp_path / "said", "peft", source_layout=verify(marked).layout or "peft", base=base)
    recipe["models"] = [{"adapter": tmp_path / "said"}]
    merge(recipe, tmp_path / "out", progress=False)


def test_output_is_never_overwritten_nor_left_half_done(saved, tmp_path):
    _, adapter = saved["gemma4"]
    (tmp_path / "out").mkdir()
    convert(adapter, tmp_path / "out", "peft018")
    with pytest.raises(AdapterError, match="exists and is not empty"):
        convert(adapter, tmp_path / "out", "unsloth")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"alpha_pattern": {"q_proj": 3}}, "vllm", r"scales .* by 1.5 and .*q_proj by 0.75, but vLLM has one scale"),
        ({"base_model_name_or_path": "org/name"}, "vllm", "names no base that is here; give --base"),
        ({"peft_type": "LOHA"}, "peft", "peft_type is 'LOHA'"),
        ({"r": 3}, "unsloth", "rows in A .* expected rank 3 times 7 experts"),
        ({"target_parameters": None}, "unsloth", "2 nested adapters, but target_parameters None name 0"),
        ({"lora_B_layout": "grouped_by_expert", "peft_version": "0.18.1"}, "peft", None),
    ],
    ids=str,
)
def test_adapter_that_cannot_be_converted_is_refused(saved, changes, to, message, tmp_path):
    _, adapter = saved["gemma4"]
    copy = edited(adapter, tmp_path / "copy", **changes)
    if message is None:  # The shapes outweigh the version that a tool left behind.
        assert convert(copy, tmp_path / "out", to) is Layout.UNSLOTH
        return
    with pytest.raises(AdapterError, match=message):
        convert(copy, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
def test_transposed_stacks_are_the_same_in_every_release(saved, version, tmp_path):
    """No release swaps stacks of [E, in, out], whatever its version says."""
    base, adapter = saved["gemma4"]
    turned = shutil.copytree(base, tmp_path / "base")
    tensors = {k: v.mT.contiguous() if ".experts." in k else v for k, v in disk_tensors(base).items()}
    save_file(tensors, turned / "model.safetensors", {"format": "pt"})
    copy = edited(adapter, tmp_path / "copy", peft_version=version, base_model_name_or_path=str(turned))
    assert convert(copy, tmp_path / "out", "peft") is Layout.PEFT
    assert same(copy, tmp_path / "out")
    for layout in ("peft018", "vllm"):
        with pytest.raises(AdapterError, match=r"no PEFT swapped and vLLM takes as they are; use layout peft"):
            convert(copy, tmp_path / layout, layout)
    assert config_of(tmp_path / "out")["peft_version"] == {"0.18.1": "0.19.1"}.get(version, version)


def test_damaged_adapters_are_named(saved, tmp_path):
    base, adapter = saved["qwen3_moe"]
    with pytest.raises(AdapterError, match=r"adapter_config.json does not exist"):
        convert(base, tmp_path / "out", "peft")
    with pytest.raises(ValueError, match="to is 'peft17', expected one of peft, peft018"):
        convert(adapter, tmp_path / "out", "peft17")
    factors = load_file(adapter / WEIGHTS)
    lone = {key: value for key, value in factors.items() if not key.endswith("layers.0.mlp.experts.lora_A.weight")}
    with pytest.raises(AdapterError, match="lora_B without its partner"):
        convert(edited(adapter, tmp_path / "lone", lone), tmp_path / "out", "peft018")
    convert(adapter, tmp_path / "vllm", "vllm")
    factors = disk_tensors(tmp_path / "vllm")
    moved = {key.replace("experts.4.", "experts.9."): value for key, value in factors.items()}
    with pytest.raises(AdapterError, match=r"is of expert 9, but .* has 5 per layer"):
        convert(edited(tmp_path / "vllm", tmp_path / "nine", moved), tmp_path / "out", "peft")
