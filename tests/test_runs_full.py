"""``moeft sft`` with ``train``: what a run leaves, what plain transformers loads, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeft
from moeft import _core
from moeft.config import SftRecipe
from moeft.errors import RecipeError
from moeft.reports import write_report
from moeft.runs.sft import run
from moeft.training.trained_weights import FILE
from tests.tiny_checkpoints import disk_tensors, save_base
from tests.tiny_training import sums, tiny_tokenizer


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny bfloat16 checkpoints with a tokenizer: experts in stacks, one by one, and under other names on disk."""
    root = tmp_path_factory.mktemp("bases")
    for family in ("gemma4", "qwen3_moe", "mixtral"):
        save_base(root / family, family, torch.bfloat16)
        tiny_tokenizer().save_pretrained(root / family)
    return root


def recipe(folder, base, **changes):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums()))
    content = {
        "model": str(base),
        "output": str(folder / "run"),
        "train": ["attention"],
        "data": {"train": str(folder / "train.jsonl")},
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "merge": {"output": str(folder / "tuned")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return SftRecipe.load(path)


def start(folder, base, **changes):
    return run(recipe(folder, base, **changes), show=lambda text: None)


@pytest.mark.parametrize("family", ["gemma4", "qwen3_moe", "mixtral"])
def test_plain_transformers_loads_what_was_trained_and_nothing_else_changed(bases, family, tmp_path):
    everything = {"train": ["attention", "router", "norms", "embeddings", "experts"], "dtype": "float32"}
    changes = everything if family != "gemma4" else {}
    folder = start(tmp_path, bases / family, **changes)
    trained = load_file(folder.path / "trained" / FILE)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16).state_dict()
    for name, value in trained.items():
        assert torch.equal(tuned[name], value.bfloat16()), name
    before, after = disk_tensors(bases / family), disk_tensors(tmp_path / "tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        changed
        if family != "gemma4"
        else changed == {name for name in before if "_proj.weight" in name and "attn" in name}
    )
    assert not (folder.path / "adapter").exists()
    assert not (tmp_path / "tuned.untrained").exists()
    outputs = json.loads((tmp_path / "tuned" / "moeft_merge.json").read_text())["outputs"]
    assert outputs == {path.name: _core.checksum(path) for path in (tmp_path / "tuned").glob("*.safetensors")}


def test_attention_in_full_beside_packed_experts_and_their_adapter(bases, tmp_path):
    folder = start(tmp_path, bases / "gemma4", quantization={}, lora={"rank": 2, "targets": ["experts"]})
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16).state_dict()
    base = disk_tensors(bases / "gemma4")
    for name, value in load_file(folder.path / "trained" / FILE).items():
        assert torch.equal(tuned[name], value)
    assert not torch.equal(tuned["model.layers.0.experts.down_proj"], base["model.layers.0.experts.down_proj"])
    assert (folder.path / "adapter" / "adapter_model.safetensors").exists()


def test_routing_before_and_after_is_in_metrics_events_and_report(bases, tmp_path):
    folder = start(tmp_path, bases / "qwen3_moe", merge=None, train=["attention", "router"], dtype="float32")
    drift = folder.read_json("metrics.json")["router_drift"]
    assert drift["tokens"] > 100
    assert 0 < drift["agreement"] < 1
    assert [event["agreement"] for event in folder.events("router_drift")] == [drift["agreement"]]
    text = write_report(folder).read_text()
    assert "same experts" in text
    assert f"{100 * drift['agreement']:.1f} %" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, None),
        ({"train": [], "lora": None}, "there is nothing to train"),
        ({"train": ["attention"], "lora": {}}, "both name attention"),
        ({"train": ["atention"]}, "train[0]: found 'atention'"),
        ({"train": ["norms", "norms"]}, "norms more than once"),
        ({"dtype": "float16"}, "float16 weights underflow"),
    ],
)
def test_recipes_that_train_nothing_twice_or_in_float16_are_refused(tmp_path, changes, message):
    if message is None:
        assert recipe(tmp_path, tmp_path, **changes).lora.targets == ("attention", "experts")
        return
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, tmp_path, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optim": "adamw_torch"}, "below 1/512 of a bfloat16 weight"),
        ({"optim": "adamw_moeft_host", "optim_args": "master_weights=false"}, "loses updates"),
        ({"optim": "adamw_moeft_8bit", "optim_args": "master_weights=False"}, "loses updates"),
    ],
)
def test_optimizers_that_lose_updates_of_bfloat16_weights_are_refused(bases, tmp_path, training, message):
    with pytest.raises(RecipeError, match=message):
        start(tmp_path, bases / "gemma4", training=training)
    assert not (tmp_path / "run").exists()


def test_base_without_a_place_for_a_trained_weight_is_refused_before_training(bases, tmp_path):
    with pytest.raises(moeft.errors.CheckpointError, match="which was trained; is it the base of this run"):
        start(
            tmp_path, bases / "gemma4", merge={"output": str(tmp_path / "tuned"), "base_model": str(bases / "mixtral")}
        )
