"""LoRA merge in Rust. Oracles: PEFT's ``merge_and_unload``, transformers' loader, safetensors' reader."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeft import _core
from moeft.errors import AdapterError, CheckpointError, RecipeError, UnsupportedModelError
from tests.tiny_checkpoints import EXPERTS, contents, disk_tensors, save_adapter, save_base
from tests.tiny_models import FAMILY_NAMES

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def merge(base: Path, adapter: Path, out: Path, **recipe: object) -> dict:
    text = {"merge_method": "lora", "base_model": str(base), "models": [{"adapter": str(adapter)}], **recipe}
    return json.loads(_core.merge_checkpoint(json.dumps(text), str(out.parent), str(out)))


def loaded(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    base = save_base(folder / "base", "qwen3_moe", torch.bfloat16, max_shard_size="60KB")
    return base, save_adapter(folder / "adapter", base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merge_equals_peft(tmp_path, family, dtype):
    dtype = DTYPES[dtype]
    base = save_base(tmp_path / "base", family, dtype)
    adapter = save_adapter(tmp_path / "adapter", base)
    report = merge(base, adapter, tmp_path / "out", rounding="peft")
    ours, theirs, before = loaded(tmp_path / "out", dtype), peft_merged(base, adapter, dtype), loaded(base, dtype)
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert {name.rsplit(".", 1)[-1] for name in changed if "experts" in name} == {"gate_up_proj", "down_proj"}
    for name in ours:
        if dtype == torch.bfloat16 or name not in changed:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            # Sums of 4 products in another order: a few f32 roundings of a delta below 0.1.
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7, msg=name)
    assert report["tensors_merged"] + report["tensors_copied"] == len(disk_tensors(base))
    assert report["base_check"] == "unverified"


def test_single_rounding_is_the_rounded_exact_sum(tmp_path):
    base = save_base(tmp_path / "base", "gemma4", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "peft", rounding="peft")
    factors, before, after = (
        load_file(adapter / "adapter_model.safetensors"),
        disk_tensors(base),
        disk_tensors(tmp_path / "out"),
    )
    name, key = "model.layers.1.experts.gate_up_proj", "base_model.model.model.layers.1.experts.base_layer"
    num_experts, out_features, _ = before[name].shape
    a = factors[f"{key}.lora_A.weight"].double().reshape(num_experts, 4, -1)
    b = factors[f"{key}.lora_B.weight"].double().reshape(out_features, 4, num_experts)
    exact = before[name].double() + torch.einsum("ore,eri->eoi", b, a) * 1.5
    different = (after[name] != exact.to(torch.bfloat16)).double().mean()
    assert different < 1e-3  # f32 sums land on the other side of a tie about once in 2^16
    assert not torch.equal(after[name], disk_tensors(tmp_path / "peft")[name])


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": EXPERTS[:1]},
        {"target_parameters": EXPERTS[1:]},
        {"target_parameters": ["mlp.experts.down_proj", "experts.gate_up_proj"]},
        {"use_rslora": True},
        {
            "rank_pattern": {"q_proj": 2, "experts.down_proj": 3},
            "alpha_pattern": {r"layers\.0\..*k_proj": 32, "experts.gate_up_proj": 5},
        },
        {"target_modules": "all-linear"},
        {"target_modules": [], "target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
    ],
    ids=["gate-up", "down", "swapped", "rslora", "patterns", "all-linear", "router"],
)
def test_every_adapter_layout_equals_peft(tmp_path, qwen, options):
    base, _ = qwen
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    merge(base, adapter, tmp_path / "out", rounding="peft")
    ours, theirs = loaded(tmp_path / "out", torch.bfloat16), peft_merged(base, adapter, torch.bfloat16)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert any(not torch.equal(ours[name], tensor) for name, tensor in loaded(base, torch.bfloat16).items())


def test_multimodal_names_take_the_adapter_of_the_text_model(tmp_path):
    base = save_base(tmp_path / "text", "gemma4", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    both = tmp_path / "both"
    both.mkdir()
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in disk_tensors(base).items()}
    save_file(renamed | {"model.vision_tower.x": torch.ones(3)}, both / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": config}))
    report = merge(both, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "expected")
    assert report["tensors_copied"] == len(renamed) + 1 - report["tensors_merged"]
    after = disk_tensors(tmp_path / "out")
    for name, value in disk_tensors(tmp_path / "expected").items():
        assert torch.equal(after[name.replace("model.", "model.language_model.", 1)], value), name


def test_per_expert_family_may_be_fused_on_disk(tmp_path, qwen):
    base, adapter = qwen
    fused = tmp_path / "fused"
    fused.mkdir()
    tensors = {name: value for name, value in loaded(base, torch.bfloat16).items() if name != "lm_head.weight"}
    tensors["lm_head.weight"] = loaded(base, torch.bfloat16)["lm_head.weight"].clone()
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", fused)
    merge(fused, adapter, tmp_path / "out", rounding="peft")
    ours, theirs = disk_tensors(tmp_path / "out"), peft_merged(base, adapter, torch.bfloat16)
    assert ours.keys() == tensors.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_untouched_tensors_headers_and_other_files_stay_byte_identical(tmp_path, qwen):
    base, adapter = qwen
    (base / "tokenizer").mkdir(exist_ok=True)
    (base / "tokenizer" / "chat.jinja").write_text("{{ x }}")
    report = merge(base, adapter, tmp_path / "out")
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) >= 3
    merged = set(report["merged"])
    for shard in shards:
        other = tmp_path / "out" / shard.name
        size = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        assert other.read_bytes()[:size] == shard.read_bytes()[:size]
        before, after = load_file(shard), load_file(other)
        assert all(torch.equal(before[name], after[name]) == (name not in merged) for name in before)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer" / "chat.jinja").read_text() == "{{ x }}"
    assert (
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    )
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "out.partial").exists()


def test_zero_adapter_is_the_identity(tmp_path, qwen):
    base, _ = qwen
    adapter = save_adapter(tmp_path / "adapter", base, spread=0.0)
    merge(base, adapter, tmp_path / "out")
    for shard in base.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_sharding_does_not_change_the_result(tmp_path, qwen):
    base, adapter = qwen
    single = save_base(tmp_path / "single", "qwen3_moe", torch.bfloat16)
    assert _core.fingerprint(str(single)) == _core.fingerprint(str(base))
    merge(base, adapter, tmp_path / "sharded")
    merge(single, adapter, tmp_path / "whole")
    left, right = disk_tensors(tmp_path / "sharded"), disk_tensors(tmp_path / "whole")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_weighted_sum_of_two_adapters_of_different_rank(tmp_path):
    base = save_base(tmp_path / "base", "gemma4", torch.float32)
    adapters = [save_adapter(tmp_path / "a", base), save_adapter(tmp_path / "b", base, seed=5, r=7, lora_alpha=3)]
    models = [
        {"adapter": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(adapters, (0.25, -2.0), strict=True)
    ]
    merge(base, adapters[0], tmp_path / "out", models=models, parameters={"scale": 0.5})
    before = loaded(base, torch.float32)
    deltas = [
        {name: value - before[name] for name, value in peft_merged(base, path, torch.float32).items()}
        for path in adapters
    ]
    for name, value in loaded(tmp_path / "out", torch.float32).items():
        expected = before[name] + 0.5 * (0.25 * deltas[0][name] - 2.0 * deltas[1][name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)


def test_out_dtype_converts_every_weight_and_the_config(tmp_path):
    base = save_base(tmp_path / "base", "mixtral", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base)
    merge(base, adapter, tmp_path / "f32")
    merge(base, adapter, tmp_path / "bf16", out_dtype="bfloat16")
    wide, narrow = disk_tensors(tmp_path / "f32"), disk_tensors(tmp_path / "bf16")
    assert all(torch.equal(narrow[name], value.bfloat16()) for name, value in wide.items())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_fingerprint_of_the_base_is_enforced(tmp_path, qwen):
    base, adapter = qwen
    stamped = shutil.copytree(adapter, tmp_path / "adapter")
    file = str(stamped / "adapter_model.safetensors")
    before = load_file(file)
    _core.stamp_metadata(file, {"moeft.base_fingerprint": _core.fingerprint(str(base))})
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["moeft.base_fingerprint"].startswith("sampled-v1:")
        assert opened.metadata()["format"] == "pt"
    assert all(torch.equal(before[name], value) for name, value in load_file(file).items())
    assert merge(base, stamped, tmp_path / "right")["base_check"] == "verified"
    other = save_base(tmp_path / "other", "qwen3_moe", torch.bfloat16, seed=9)
    with pytest.raises(AdapterError, match="trained on another base"):
        merge(other, stamped, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def edited(adapter: Path, folder: Path, **changes: object) -> Path:
    copy = shutil.copytree(adapter, folder)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is true: DoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"bias": "all"}, 'bias is "all": trained biases'),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"peft_type": "LOHA"}, 'peft_type is "LOHA"'),
        ({"peft_version": "0.18.1"}, "peft_version is 0.18.1, and adapters of expert stacks"),
        ({"peft_version": "0.19.0"}, "written before peft 0.19.1"),
        ({"peft_version": "0.19.1.dev0@main"}, "written before peft 0.19.1"),
        ({"peft_version": None}, "peft_version is not recorded"),
        ({"target_parameters": EXPERTS[:1]}, "2 nested adapters"),
        ({"target_parameters": None}, r"2 nested adapters but target_parameters \[\] name 0"),
        ({"r": 8}, "with rank 8; is this the right base model"),
        ({"r": "x"}, 'r is "x", expected a number'),
    ],
)
def test_adapter_that_cannot_be_merged_is_refused(tmp_path, qwen, changes, message):
    base, adapter = qwen
    with pytest.raises(AdapterError, match=message):
        merge(base, edited(adapter, tmp_path / "adapter", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0.dev0", "0.21.2", "1.0.0"])
def test_peft_versions_of_the_known_layout_are_taken(tmp_path, qwen, version):
    base, adapter = qwen
    merge(base, adapter, tmp_path / "expected")
    merge(base, edited(adapter, tmp_path / "adapter", peft_version=version), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_leftover_key_is_refused(tmp_path, qwen):
    base, adapter = qwen
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    file = copy / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.norm.weight": torch.ones(4)}, file)
    with pytest.raises(AdapterError, match=r"1 keys cannot be used: base_model.model.model.norm.weight"):
        merge(base, copy, tmp_path / "out")
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors does not exist"):
        merge(base, copy, tmp_path / "out")


def test_adapter_of_another_model_is_refused(tmp_path, qwen):
    _, adapter = qwen
    base = save_base(tmp_path / "base", "olmoe", torch.bfloat16)
    with pytest.raises(AdapterError, match="is this the right base model"):
        merge(base, adapter, tmp_path / "out")


def test_non_finite_result_is_refused_by_name_and_position(tmp_path, qwen):
    base, adapter = qwen
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{module}.lora_A.weight"][0, 0] = 10
    tensors[f"{module}.lora_B.weight"][3, 0] = 3e38
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"model.layers.0.self_attn.q_proj.weight would become inf at \[3, 0\]"):
        merge(base, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "ties"])
@pytest.mark.parametrize(("key", "place"), [("self_attn.q_proj.lora_B", [3, 0]), ("experts.base_layer.lora_A", [5, 2])])
def test_a_factor_that_is_not_finite_is_refused_by_its_key(tmp_path, qwen, method, key, place):
    base, adapter = qwen
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.model.layers.0.{'mlp.' if 'experts' in key else ''}{key}.weight"
    tensors[name][tuple(place)] = float("nan")
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=re.escape(f"{name} has the non-finite value NaN at {place}")):
        merge(base, copy, tmp_path / "out", merge_method=method)


def test_a_copied_tensor_that_is_not_finite_is_refused_by_name(tmp_path, qwen):
    base, adapter = qwen
    copy = shutil.copytree(base, tmp_path / "base")
    for value in ("inf", "nan"):
        file = next(file for file in copy.glob("*.safetensors") if "model.norm.weight" in load_file(file))
        tensors = load_file(file)
        tensors["model.norm.weight"][3] = float(value)
        save_file(tensors, file, {"format": "pt"})
        for rest in ({}, {"out_dtype": "float32"}):
            with pytest.raises(CheckpointError, match=r"model.norm.weight in .* has the non-finite value \w+ at \[3\]"):
                merge(copy, adapter, tmp_path / f"out-{value}-{len(rest)}", **rest)


def test_packed_base_is_refused(tmp_path, qwen):
    base, adapter = qwen
    _core.quantize_checkpoint(str(base), str(tmp_path / "packed"), "{}")
    with pytest.raises(CheckpointError, match="merge into the 16-bit base"):
        merge(tmp_path / "packed", adapter, tmp_path / "out")


def test_existing_output_is_never_overwritten(tmp_path, qwen):
    base, adapter = qwen
    out = tmp_path / "out"
    out.mkdir()
    merge(base, adapter, out)  # an empty folder may be there
    names = sorted(path.name for path in out.iterdir())
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        merge(base, adapter, out)
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"merge_metod": "lora"}, 'unknown key "merge_metod" in the top level.*did you mean "merge_method"'),
        ({"merge_method": "soup"}, 'merge_method is "soup", expected lora'),
        ({"parameters": {"scal": 1}}, 'did you mean "scale"'),
        ({"models": [{"adapter": "a", "parameters": {"wight": 1}}]}, r'models\[0\].parameters.*did you mean "weight"'),
        ({"models": []}, "at least one"),
        ({"out_dtype": "int8"}, "bfloat16 or float16 or float32"),
        ({"dtype": "bfloat16"}, "expected float32"),
        ({"rounding": "twice"}, "single or peft"),
        ({"merge_method": None}, "merge_method is missing"),
        ({"models": {"adapter": "a"}}, r'models is {"adapter":"a"}, expected a list'),
        ({"models": [{"adapter": 3}]}, "adapter is 3, expected a path"),
        ({"seed": -1}, "seed is -1, expected a whole number"),
    ],
)
def test_recipe_errors_say_what_is_known(tmp_path, recipe, message):
    with pytest.raises(RecipeError, match=message):
        merge(tmp_path, tmp_path, tmp_path / "out", **recipe)


def test_recipe_may_be_yaml_with_relative_paths(tmp_path, qwen):
    base, adapter = qwen
    models = f"- adapter: {adapter.name}\n  parameters: {{weight: 1.0}}"
    text = f"merge_method: lora\nbase_model: {base.name}\nmodels:\n{models}\n"
    _core.merge_checkpoint(text, str(base.parent), str(tmp_path / "yaml"))
    merge(base, adapter, tmp_path / "json", models=[{"adapter": str(adapter), "parameters": {"weight": 1.0}}])
    assert contents(tmp_path / "yaml") == contents(tmp_path / "json")
    with pytest.raises(RecipeError, match="neither YAML nor JSON"):
        _core.merge_checkpoint("a: [", ".", str(tmp_path / "x"))


def with_model_type(base: Path, folder: Path, model_type: str) -> Path:
    copy = shutil.copytree(base, folder)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return copy


def test_unknown_model_type_names_the_known(tmp_path, qwen):
    _, adapter = qwen
    base = save_base(tmp_path / "base", "mixtral", torch.bfloat16)  # w1, w2 and w3 do not say what they are
    copy = with_model_type(base, tmp_path / "copy", "gemma9")
    with pytest.raises(UnsupportedModelError, match=r"gemma9.*mixtral"):
        merge(copy, adapter, tmp_path / "out")


@pytest.mark.parametrize("family", ["gemma4", "qwen3_moe", "gpt_oss"])
def test_unknown_model_type_is_merged_by_the_names_and_shapes_of_its_experts(tmp_path, family):
    base = save_base(tmp_path / "base", family, torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    copy = with_model_type(base, tmp_path / "copy", "gemma9")
    merge(base, adapter, tmp_path / "known")
    merge(copy, adapter, tmp_path / "unknown")
    known, unknown = disk_tensors(tmp_path / "known"), disk_tensors(tmp_path / "unknown")
    assert known.keys() == unknown.keys()
    assert all(torch.equal(known[name], unknown[name]) for name in known)


def test_interruption_propagates_and_the_next_run_goes_on(tmp_path, qwen):
    base, adapter = qwen
    recipe = json.dumps({"merge_method": "lora", "base_model": str(base), "models": [{"adapter": str(adapter)}]})
    calls = []

    def stop(done: int, total: int, what: str) -> None:
        calls.append((done, total, what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _core.merge_checkpoint(recipe, ".", str(tmp_path / "out"), stop)
    assert len(calls) == 1
    assert 0 < calls[0][0] < calls[0][1]
    assert not (tmp_path / "out").exists()
    _core.merge_checkpoint(recipe, ".", str(tmp_path / "out"), lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    merge(base, adapter, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
