"""``moeft merge --verify`` holds for every merge that is right, and for none that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeft.cli import main
from moeft.merging import merge, plan
from moeft.merging.verify_weights import prove_weights
from moeft.runs.verified_merge import run
from tests.tiny_checkpoints import save_adapter, save_base
from tests.tiny_models import tiny_config

NAMES, COPIES, VALUES, LOGITS = range(4)
QUERY = "model.layers.0.self_attn.q_proj.weight"
STACK = "model.layers.0.experts.down_proj"
ONE, OTHER = {"model": "one", "parameters": {"weight": 0.7}}, {"model": "other", "parameters": {"weight": 0.5}}
LORA = {
    "merge_method": "lora",
    "base_model": "base",
    "models": [{"adapter": "r4", "parameters": {"weight": 0.6}}, {"adapter": "r7"}],
    "parameters": {"normalize": True, "scale": 1.5},
}
RECIPES = {
    "lora": LORA,
    "task_arithmetic": {"base_model": "base", "models": [ONE, {"adapter": "r4"}], "parameters": {"lambda": [0.3, 1.0]}},
    "linear": {"models": [ONE, OTHER]},
    "slerp": {
        "models": [{"model": "one"}, {"model": "other"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.4}]},
    },
    "model_stock": {
        "base_model": "base",
        "models": [{"model": "one"}, {"model": "other"}],
        "parameters": {"filter_wise": True},
    },
    "fisher_damped": {
        "base_model": "base",
        "models": [{"adapter": "r4"}, {"adapter": "r7"}, {"model": "one"}],
        "parameters": {"scale": 0.3},
        "fisher": "fisher.safetensors",
        "layer_importance": "layers.json",
        "missing_layers": 0.25,
    },
    "passthrough": {"models": [{"model": "one", "parameters": {"scale": 0.3}}]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base whose experts are stacks on disk, two fine-tunes, two adapters and importance files."""
    folder = tmp_path_factory.mktemp("models")
    # With these seeds rounding sends a token to another expert: its logits move as far as by an unmerged stack.
    base = save_base(folder / "base", "gemma4", torch.bfloat16, seed=3)
    for seed, name in ((1, "one"), (2, "other")):
        shutil.copytree(base, folder / name)
        generator = torch.Generator().manual_seed(seed)
        file = folder / name / "model.safetensors"
        noisy = {
            key: value + (0.05 * torch.randn(value.shape, generator=generator)).to(value.dtype)
            for key, value in load_file(file).items()
        }
        save_file(noisy, file, {"format": "pt"})
    save_adapter(folder / "r4", base, seed=4)
    save_adapter(folder / "r7", base, seed=8, r=7, lora_alpha=3)
    fisher = {name: value.float().abs() for name, value in load_file(base / "model.safetensors").items()}
    save_file(fisher, folder / "fisher.safetensors")
    content = {"format": "moeft-layer-importance-v1", "layers": {"0": 2.0, "1": 5.0}}
    (folder / "layers.json").write_text(json.dumps(content))
    return folder


def merged(models: Path, method: str, out: Path) -> Path:
    recipe = models / f"{method}.yaml"
    recipe.write_text(json.dumps({"merge_method": method, "out_dtype": "bfloat16"} | RECIPES[method]))
    merge(recipe, out, progress=False)
    return recipe


def change(folder: Path, name: str, place: int, steps: int) -> None:
    """Move one value of a merged checkpoint by so many bf16 steps."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(torch.int16).flatten()[place] += steps
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", RECIPES)
def test_a_right_merge_is_proved_and_a_value_two_steps_off_is_found(models, tmp_path, method):
    recipe = merged(models, method, tmp_path / "out")
    proofs = run(recipe, tmp_path / "out")
    assert [proof.ok for proof in proofs] == [True] * len(proofs), "\n".join(map(str, proofs))
    assert len(proofs) == (LOGITS + 1 if method == "lora" else LOGITS)
    computed, _, total = proofs[VALUES].how.partition("; ")[2].partition(" of ")
    assert int(computed) == int(total.split()[0]) > 0
    assert proofs[VALUES].measured > 0.5  # Of hundreds of values some are rounded by nearly half a step.
    change(tmp_path / "out", QUERY, 5, 2)
    assert [proof.ok for proof in run(recipe, tmp_path / "out")][: VALUES + 1] == [True, True, False]


def test_every_layout_of_experts_is_computed_again(tmp_path):
    """One by one on disk, stacks under other names, transposed stacks, and stacks whose matrices are square."""
    square = tiny_config("gemma4")
    square.moe_intermediate_size = square.hidden_size // 2
    for config in (tiny_config("mixtral"), tiny_config("granitemoe"), tiny_config("gpt_oss"), square):
        folder = tmp_path / config.model_type
        base = save_base(folder / "base", config, torch.bfloat16)
        save_adapter(folder / "r4", base, target_modules=["q_proj"])
        recipe = folder / "recipe.yaml"
        content = {"merge_method": "lora", "base_model": "base", "models": [{"adapter": "r4"}]}
        recipe.write_text(json.dumps(content))
        merge(recipe, folder / "out", progress=False)
        proofs = prove_weights(recipe, folder / "out")
        assert all(proof.ok for proof in proofs), "\n".join(map(str, proofs))
        planned = [tensor["action"] for tensor in plan(recipe)["tensors"]]
        assert f"; {planned.count('merge')} of {planned.count('merge')} computed" in proofs[VALUES].how


def test_values_that_cannot_be_computed_again_are_no_proof(models, tmp_path):
    (models / "peft.yaml").write_text(json.dumps(LORA | {"rounding": "peft"}))
    merge(models / "peft.yaml", tmp_path / "out", progress=False)
    said = []
    proofs = prove_weights(models / "peft.yaml", tmp_path / "out", said.append)
    assert len(proofs) == VALUES
    assert "none of" in said[0]


def test_a_single_number_is_computed_again(models, tmp_path):
    for folder in ("base", "one", "other"):
        shutil.copytree(models / folder, tmp_path / folder)
        tensors = load_file(tmp_path / folder / "model.safetensors")
        tensors["model.scale"] = torch.tensor(float(len(folder)), dtype=torch.bfloat16)
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "recipe.yaml").write_text(json.dumps({"merge_method": "linear", "models": [ONE, OTHER]}))
    merge(tmp_path / "recipe.yaml", tmp_path / "out", progress=False)
    assert all(proof.ok for proof in prove_weights(tmp_path / "recipe.yaml", tmp_path / "out"))
    change(tmp_path / "out", "model.scale", 0, 1)
    assert not prove_weights(tmp_path / "recipe.yaml", tmp_path / "out")[VALUES].ok


def test_what_is_not_the_merge_of_the_recipe_is_found(models, tmp_path):
    recipe = merged(models, "lora", tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "norm")
    change(tmp_path / "norm", "model.norm.weight", 0, 1)
    assert [proof.ok for proof in run(recipe, tmp_path / "norm")][: VALUES + 1] == [True, False, True]
    shutil.copytree(tmp_path / "out", tmp_path / "lost")
    tensors = load_file(tmp_path / "lost" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    assert not run(recipe, tmp_path / "lost")[NAMES].ok
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(LORA | {"out_dtype": "bfloat16", "parameters": {}}).replace('"r', f'"{models}/r'))
    other.write_text(other.read_text().replace('"base"', f'"{models}/base"'))
    proofs = run(other, tmp_path / "out")
    assert [proof.ok for proof in proofs] == [True, True, False, False]


def test_a_stack_of_experts_that_was_not_merged_is_found(models, tmp_path):
    recipe = merged(models, "lora", tmp_path / "out")
    base = load_file(models / "base" / "model.safetensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(tensors | {STACK: base[STACK]}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    proofs = run(recipe, tmp_path / "out")
    assert [proof.ok for proof in proofs] == [True, True, False, False]


def test_the_command_merges_then_verifies_and_again_verifies_what_is_there(models, tmp_path, capfd):
    (models / "command.yaml").write_text(json.dumps(LORA))
    words = ["merge", str(models / "command.yaml"), "--out", str(tmp_path / "out"), "--quiet", "--verify"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "ok     logits of the merged checkpoint equal base and adapters" in capfd.readouterr().out
    change(tmp_path / "out", QUERY, 5, 2)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--json"])
    assert stop.value.code == 1
    found, answer = map(json.loads, capfd.readouterr().out.splitlines())
    assert found["found"] == "merged before"
    assert [proof["ok"] for proof in answer["proofs"]][: VALUES + 1] == [True, True, False]
