"""Merge methods against their formulas in float64, and what must hold for all of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeft.checkpoint import fuse_experts
from moeft.errors import CheckpointError, RecipeError
from moeft.merging import merge, plan
from tests.tiny_checkpoints import contents, disk_tensors, save_adapter, save_base


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of several files, two fine-tunes and two adapters of other ranks."""
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base", "qwen3_moe", torch.float32, max_shard_size="120KB")
    for seed, name in ((1, "a"), (2, "b")):
        shutil.copytree(base, folder / name)
        generator = torch.Generator().manual_seed(seed)
        for file in (folder / name).glob("*.safetensors"):
            noisy = {
                key: value + 0.01 * torch.randn(value.shape, generator=generator)
                for key, value in load_file(file).items()
            }
            save_file(noisy, file, {"format": "pt"})
    save_adapter(folder / "r4", base)
    save_adapter(folder / "r7", base, seed=5, r=7, lora_alpha=3)
    return folder


def recipe(models: Path, method: str, *names: str, base: str | None = "base", **rest: object) -> dict:
    entries = [{"adapter" if name.startswith("r") else "model": str(models / name)} for name in names]
    made = {"merge_method": method, "models": entries, **rest}
    return made if base is None else made | {"base_model": str(models / base)}


def run(models: Path, out: Path, method: str, *names: str, **rest: object) -> dict[str, torch.Tensor]:
    merge(recipe(models, method, *names, **rest), out, progress=False)
    return disk_tensors(out)


def deltas(models: Path, tmp_path: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    base = disk_tensors(models / "base")
    whole = []
    for name in names:
        tuned = models / name
        if name.startswith("r"):
            merge(recipe(models, "lora", name), tmp_path / f"whole-{name}", progress=False)
            tuned = tmp_path / f"whole-{name}"
        whole.append({key: value.double() - base[key].double() for key, value in disk_tensors(tuned).items()})
    return whole


def check(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        # Some f32 roundings of weights below 2.
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=0, atol=5e-7, msg=name)


def test_delta_average_of_adapters_and_models(models, tmp_path):
    base, found = disk_tensors(models / "base"), deltas(models, tmp_path, "r4", "r7")
    weights = [{"weight": 0.5}, {"weight": 1.5}]
    made = recipe(models, "lora", "r4", "r7", parameters={"normalize": True})
    made["models"] = [model | {"parameters": own} for model, own in zip(made["models"], weights, strict=True)]
    merge(made, tmp_path / "out", progress=False)
    expected = {name: value + (0.5 * found[0][name] + 1.5 * found[1][name]) / 2 for name, value in base.items()}
    check(disk_tensors(tmp_path / "out"), expected)
    with pytest.raises(RecipeError, match="sum of the weights"):
        merge(
            made
            | {
                "parameters": {"normalize": True, "weight": 1},
                "models": [
                    {**made["models"][0], "parameters": {"weight": -1}},
                    {**made["models"][1], "parameters": {}},
                ],
            },
            tmp_path / "zero",
            progress=False,
        )


def test_task_arithmetic_takes_models_and_adapters(models, tmp_path):
    base, found = disk_tensors(models / "base"), deltas(models, tmp_path, "a", "r4")
    ours = run(models, tmp_path / "out", "task_arithmetic", "a", "r4", parameters={"scale": 0.5, "weight": 0.8})
    check(ours, {name: value + 0.4 * (found[0][name] + found[1][name]) for name, value in base.items()})


def test_linear_takes_an_adapter_as_the_base_with_its_delta(models, tmp_path):
    base, found = disk_tensors(models / "base"), deltas(models, tmp_path, "a", "r4")
    ours = run(models, tmp_path / "out", "linear", "a", "r4")
    check(ours, {name: value + 0.5 * (found[0][name] + found[1][name]) for name, value in base.items()})


def test_fisher_damping_holds_back_where_the_base_matters(models, tmp_path):
    base, found = disk_tensors(models / "base"), deltas(models, tmp_path, "a", "r4")
    generator = torch.Generator().manual_seed(3)
    undamped = "model.norm.weight"
    fisher = {name: torch.rand(value.shape, generator=generator) for name, value in base.items() if name != undamped}
    save_file(fisher, tmp_path / "fisher.safetensors")
    layers = len({name.split(".")[2] for name in base if ".layers." in name})
    raw = {str(layer): 3.0 + 2 * layer for layer in range(layers)}
    text = json.dumps({"format": "moeft-layer-importance-v1", "layers": raw})
    (tmp_path / "layers.json").write_text(text)
    files = {"fisher": str(tmp_path / "fisher.safetensors"), "layer_importance": str(tmp_path / "layers.json")}
    ours = run(models, tmp_path / "out", "fisher_damped", "a", "r4", parameters={"scale": 0.5}, **files)
    expected = {}
    for name, value in base.items():
        f = fisher.get(name, torch.zeros_like(value)).double()
        f = (f - f.min()) / (f.max() - f.min()) if name in fisher else f
        layer = int(name.split(".")[2]) / (layers - 1) if ".layers." in name else 0.0
        expected[name] = value + 0.5 * (1 - f) * (1 - layer) * (found[0][name] + found[1][name]) / 2
    check(ours, expected)
    stated = {
        f"{edge}:{name}": str(getattr(value, edge)().item())
        for name, value in fisher.items()
        for edge in ("min", "max")
    }
    save_file(fisher, tmp_path / "fisher.safetensors", stated)
    again = run(models, tmp_path / "again", "fisher_damped", "a", "r4", parameters={"scale": 0.5}, **files)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    with pytest.raises(RecipeError, match="missing_layers is set, expected layer_importance"):
        run(models, tmp_path / "bad", "fisher_damped", "a", missing_layers=0.5)


def test_layers_that_were_not_measured_are_refused_or_as_important_as_the_recipe_says(models, tmp_path):
    base, found = disk_tensors(models / "base"), deltas(models, tmp_path, "a")[0]
    layers = len({name.split(".")[2] for name in base if ".layers." in name})
    raw = {str(layer): 3.0 + 2 * layer for layer in range(1, layers)}
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"format": "moeft-layer-importance-v1", "layers": raw}))
    with pytest.raises(
        CheckpointError, match=r"\[0\] are missing; measure them too, or say in the recipe .* missing_layers"
    ):
        run(models, tmp_path / "bad", "fisher_damped", "a", layer_importance=str(file))
    with pytest.raises(RecipeError, match="missing_layers is 2, expected a number from 0 to 1"):
        run(models, tmp_path / "bad", "fisher_damped", "a", layer_importance=str(file), missing_layers=2)
    ours = run(models, tmp_path / "out", "fisher_damped", "a", layer_importance=str(file), missing_layers=0.75)
    expected = {}
    for name, value in base.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        importance = 0.0 if layer is None else 0.75 if layer == 0 else (layer - 1) / max(layers - 2, 1)
        expected[name] = value + (1 - importance) * found[name]
    check(ours, expected)
    file.write_text(json.dumps({"format": "moeft-layer-importance-v1", "layers": raw | {str(layers): 1.0}}))
    with pytest.raises(CheckpointError, match=f'names layer "{layers}", the base has 0 to {layers - 1}'):
        run(models, tmp_path / "bad", "fisher_damped", "a", layer_importance=str(file), missing_layers=0)


def test_ties_keeps_exactly_the_largest_and_the_first_of_equals(models, tmp_path):
    base = disk_tensors(models / "base")
    for file in shutil.copytree(models / "base", tmp_path / "t").glob("*.safetensors"):
        save_file({k: torch.full_like(v, 2.0) for k, v in load_file(file).items()}, file, {"format": "pt"})
    for file in shutil.copytree(models / "base", tmp_path / "zeros").glob("*.safetensors"):
        save_file({k: torch.zeros_like(v) for k, v in load_file(file).items()}, file, {"format": "pt"})
    made = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "zeros"),
        "parameters": {"density": 0.3},
        "models": [{"model": str(tmp_path / "t")}],
    }
    merge(made, tmp_path / "out", progress=False)
    for name, value in disk_tensors(tmp_path / "out").items():
        kept = max(1, int(value.numel() * 0.3))
        assert value.numel() == base[name].numel()
        assert torch.equal(value.flatten(), torch.tensor([2.0] * kept + [0.0] * (value.numel() - kept))), name


@pytest.mark.parametrize(
    "method", ["ties", "dare_ties", "della", "breadcrumbs", "slerp", "fisher_damped", "model_stock"]
)
def test_threads_and_shards_change_no_bit(models, tmp_path, method):
    names = ["a"] if method == "slerp" else ["a", "b"]
    parameters = {"slerp": {"t": 0.3}, "fisher_damped": {}, "model_stock": {}}.get(method, {"density": 0.5})
    made = recipe(models, method, *names, parameters=parameters)
    merge(made, tmp_path / "one", progress=False, threads=1)
    merge(made, tmp_path / "two", progress=False, threads=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    merge(made, tmp_path / "cut", progress=False, max_shard_bytes=50_000)
    one, cut = disk_tensors(tmp_path / "one"), disk_tensors(tmp_path / "cut")
    assert one.keys() == cut.keys()
    assert all(torch.equal(value, cut[name]) for name, value in one.items())
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in cut.values())
    sizes = [path.stat().st_size for path in (tmp_path / "cut").glob("*.safetensors")]
    assert len(sizes) > len(list((tmp_path / "one").glob("*.safetensors")))
    assert max(sizes) < max(50_000, max(value.nbytes for value in cut.values())) + 20_000


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "task_arithmetic", "ties", "passthrough"])
def test_a_model_merged_with_itself_stays_as_it_is(models, tmp_path, method):
    folder = shutil.copytree(models / "a", tmp_path / "copy")
    parameters = {"t": 0.3} if method == "slerp" else {}
    names = [folder] if method in ("passthrough", "slerp") else [folder, folder]
    base = {} if method in ("linear", "nuslerp", "passthrough") else {"base_model": str(models / "a")}
    made = {
        "merge_method": method,
        "models": [{"model": str(name)} for name in names],
        "parameters": parameters,
        **base,
    }
    merge(made, tmp_path / "out", progress=False)
    before, after = disk_tensors(models / "a"), disk_tensors(tmp_path / "out")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_slerp_is_symmetric_and_reports_its_branch(models, tmp_path):
    left = run(models, tmp_path / "left", "slerp", "b", base="a", parameters={"t": 0.25, "unit": "row"})
    right = run(models, tmp_path / "right", "slerp", "a", base="b", parameters={"t": 0.75, "unit": "row"})
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=2e-7)
    report = merge(recipe(models, "slerp", "b", base="a", parameters={"t": 0.5}), tmp_path / "r", progress=False)
    assert {found["branch"].split()[0] for found in report.merged.values()} <= {"slerp", "lerp"}
    assert report.base_check == "no_adapter"
    manifest = json.loads((tmp_path / "r" / "moeft_merge.json").read_text())
    assert manifest["tensors"] == report.merged
    assert [entry["name"] for entry in manifest["inputs"]] == ["a", "b"]
    assert manifest["outputs"].keys() == {path.name for path in (tmp_path / "r").glob("*.safetensors")}


def test_a_fused_model_meets_one_tensor_per_expert(models, tmp_path):
    fuse_experts(models / "b", tmp_path / "fused", progress=False)
    plain = run(models, tmp_path / "plain", "linear", "a", "b")
    mixed = {
        "merge_method": "linear",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / "a")}, {"model": str(tmp_path / "fused")}],
    }
    merge(mixed, tmp_path / "mixed", progress=False)
    found = disk_tensors(tmp_path / "mixed")
    assert found.keys() == plain.keys()
    assert all(torch.equal(value, found[name]) for name, value in plain.items())
    fuse_experts(tmp_path / "plain", tmp_path / "expected", progress=False)
    mixed |= {"base_model": str(tmp_path / "fused")}
    merge(mixed, tmp_path / "stacks", progress=False)
    found, expected = disk_tensors(tmp_path / "stacks"), disk_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_weights_that_cancel_out_but_for_rounding_are_refused(models, tmp_path):
    weights = [{"weight": 0.1}, {"weight": 0.2}, {"weight": -0.3}]
    for method, rest in (("linear", "normalize: false"), ("fisher_damped", "divided by it$")):
        made = recipe(models, method, "a", "b", "a")
        made["models"] = [model | {"parameters": own} for model, own in zip(made["models"], weights, strict=True)]
        with pytest.raises(RecipeError, match=f"the sum of the weights of .* is 0 but for rounding.*{rest}"):
            plan(made)


def test_fisher_values_of_another_model_are_refused(models, tmp_path):
    save_file({"transformer.h.0.weight": torch.ones(3)}, tmp_path / "fisher.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer.h.0.weight.*no values for any of the \d+ merged tensors"):
        plan(recipe(models, "fisher_damped", "a", fisher=str(tmp_path / "fisher.safetensors")))


def test_floats_that_are_not_computed_are_refused_and_integers_are_those_of_the_base(tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
    made = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in ("one", "other")]}
    for dtype in (torch.float64, torch.float8_e4m3fn, torch.int64):
        for folder, value in (("one", 1), ("other", 2)):
            save_file({"model.x": torch.full((4,), value).to(dtype)}, tmp_path / folder / "model.safetensors")
        if dtype == torch.int64:
            merge(made, tmp_path / "out", progress=False)
            assert disk_tensors(tmp_path / "out")["model.x"].tolist() == [1, 1, 1, 1]
        else:
            with pytest.raises(CheckpointError, match=r"model.x is F\w+ \[4\], expected F32, BF16 or F16"):
                plan(made)


def test_the_plan_counts_factors_and_stays_below_the_promise(tmp_path):
    rank, cols = 256, 16384
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    module = "model.layers.0.mlp.down_proj"
    save_file({f"{module}.weight": torch.zeros(32, cols, dtype=torch.bfloat16)}, base / "model.safetensors")
    factors = {"lora_A": torch.zeros(rank, cols, dtype=torch.bfloat16), "lora_B": torch.zeros(32, rank)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"base_model.model.{module}.{side}.weight": value for side, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    made = {"merge_method": "lora", "base_model": str(base), "models": [{"adapter": str(adapter)}] * 4}
    # At least two chunks are under way, each with the factors of four adapters in float32.
    assert 2 * 4 * rank * cols * 4 < plan(made)["memory_bytes"] < 256 << 20


def test_a_text_model_leaves_the_rest_of_a_multimodal_one_alone(tmp_path):
    text = save_base(tmp_path / "text", "gemma4", torch.float32)
    tuned = save_base(tmp_path / "tuned", "gemma4", torch.float32, seed=4)
    both = tmp_path / "both"
    both.mkdir()
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in disk_tensors(text).items()}
    save_file(renamed | {"model.vision_tower.x": torch.ones(3)}, both / "model.safetensors")
    config = json.loads((text / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": config}))
    made = {"merge_method": "linear", "models": [{"model": str(both)}, {"model": str(tuned)}]}
    merge(made, tmp_path / "out", progress=False)
    merge(made | {"models": [{"model": str(text)}, {"model": str(tuned)}]}, tmp_path / "expected", progress=False)
    found = disk_tensors(tmp_path / "out")
    assert torch.equal(found.pop("model.vision_tower.x"), torch.ones(3))
    for name, value in disk_tensors(tmp_path / "expected").items():
        assert torch.equal(found[name.replace("model.", "model.language_model.", 1)], value), name


def edited(folder: Path, out: Path, change) -> Path:
    shutil.copytree(folder, out)
    file = next(file for file in out.glob("*.safetensors") if "lm_head.weight" in load_file(file))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = out / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    kept = {name: place for name, place in places["weight_map"].items() if place != file.name}
    index.write_text(json.dumps(places | {"weight_map": kept | dict.fromkeys(tensors, file.name)}))
    return out


BROKEN = {
    "missing": (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight is missing.*copy does not hold it"),
    "extra": (lambda tensors: tensors.update(extra=torch.ones(2)), "extra in .*copy is F32.*absent, as in the base"),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 5)}),
        r"lm_head.weight in .*copy is F32 \[3, 5\], expected weights that fit",
    ),
    "nan": (
        lambda tensors: tensors["lm_head.weight"].view(-1).__setitem__(3, float("nan")),
        r"lm_head.weight in .*copy/.* has the non-finite value NaN at \[0, 3\]",
    ),
    "integers": (
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].int()}),
        "lm_head.weight in .*copy is I32",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_model_that_does_not_fit_is_refused_by_name(models, tmp_path, method, broken):
    change, message = BROKEN[broken]
    copy = edited(models / "a", tmp_path / "copy", change)
    made = {"merge_method": method, "base_model": str(models / "base"), "models": [{"model": str(copy)}]}
    with pytest.raises(CheckpointError, match=message):
        merge(made, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"density": 1.5}}, "density of .* is 1.5, expected a number from 0 to 1"),
        ({"parameters": {"densty": 1}}, 'did you mean "density"'),
        ({"parameters": {"density": [{"filter": "(", "value": 1}]}}, "regular expression"),
        ({"merge_method": "slerp"}, "t of .* is missing"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5, "unit": "layer"}}, "tensor or row or expert"),
        ({"merge_method": "model_stock"}, "at least 2 for model_stock"),
        ({"base_model": None}, "base_model is missing"),
        ({"fisher": "f"}, "fisher is set, expected merge_method fisher_damped, not ties"),
        ({"merge_method": "lora"}, "task_arithmetic takes models and adapters"),
        ({"models": [{}]}, "one of model and adapter"),
        ({"merge_method": "della", "parameters": {"density": 0.9}}, "set a smaller epsilon"),
    ],
)
def test_a_recipe_that_cannot_be_used_says_why(models, tmp_path, change, message):
    made = recipe(models, "ties", "a") | change
    made = {key: value for key, value in made.items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        plan(made)


def test_a_plan_names_inputs_and_bytes(models):
    planned = plan(recipe(models, "ties", "a", "r4"))
    tensors = {tensor["name"]: tensor for tensor in planned["tensors"]}
    base = disk_tensors(models / "base")
    assert tensors.keys() == base.keys()
    one = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert one["inputs"] == [str(models / "a"), str(models / "r4")]
    assert one["read_bytes"] == 2 * one["written_bytes"] == 2 * base[one["name"]].nbytes
    assert planned["written_bytes"] == sum(value.nbytes for value in base.values())
    assert planned["memory_bytes"] < 200 << 20
