"""``moeft dpo`` from recipe to run folder: adapters on adapters, the cache, what it refuses, how it goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeft
from moeft.cli import main
from moeft.config.dpo import DpoRecipe
from moeft.errors import DataError, RecipeError, RunFolderError
from moeft.runs.dpo import dry_run, run
from moeft.training.trainer import MoeTrainer
from tests.interruption import KilledError
from tests.tiny_models import randomise_lora, save_tiny_model, token_ids
from tests.tiny_preferences import pairs, write_pairs
from tests.tiny_training import load, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny bfloat16 checkpoint with its tokenizer."""
    folder = save_tiny_model("qwen3_moe", tmp_path_factory.mktemp("base"), torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sft_adapter(base, tmp_path_factory):
    """An adapter that has an effect, as supervised training leaves one."""
    model = moeft.add_lora(load(base), 4, targets=("attention", "experts"), seed=1)
    randomise_lora(model)
    folder = tmp_path_factory.mktemp("sft")
    model.save_pretrained(folder)
    return folder


def write_recipe(folder, base, name="run", **changes):
    rows = [*pairs(12), {"prompt": "hi", "chosen": "same", "rejected": "same"}]
    recipe = {
        "model": str(base),
        "output": name,
        "dtype": "float32",
        "lora": {"rank": 2, "targets": ["attention", "experts"]},
        "data": {
            "train": str(write_pairs(folder / "train.jsonl", rows)),
            "eval": str(write_pairs(folder / "heldout.jsonl", pairs(16)[12:])),
            "max_reject_share": 0.1,
        },
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1,
            "save_steps": 2, "use_cpu": True, "disable_tqdm": True,
        },
    }  # fmt: skip
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if isinstance(recipe.get(section), dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(path, **options):
    return run(DpoRecipe.load(path), show=lambda text: None, **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.mark.parametrize("train", ["new", "both", "start"])
def test_adapters_are_trained_saved_and_merged_as_the_recipe_says(base, sft_adapter, tmp_path, train):
    path = write_recipe(
        tmp_path, base, train=train, lora={"stack_on": [str(sft_adapter)]}, merge={"output": str(tmp_path / "merged"),
        "out_dtype": "float32"},
    )  # fmt: skip
    folder = start(path)
    metrics = folder.read_json("metrics.json")
    held_out = metrics["heldout"]
    assert held_out["before"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    assert held_out["after"]["kl"] > 0
    assert metrics["data"]["rejected_pairs"] == 1
    adapter = folder.path / "adapter"
    below = adapter / "below_0" / "adapter_model.safetensors"
    assert below.is_file() == (train == "both")
    if train == "both":
        was, now = load_file(sft_adapter / "adapter_model.safetensors"), load_file(below)
        assert any(not torch.equal(was[name], now[name]) for name in was)
    tuned = load(base)
    for index, saved in enumerate(DpoRecipe.load(path).adapters(adapter)):
        tuned = moeft.load_adapter(tuned, saved, name=f"part_{index}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=1e-4, atol=1e-4)


def test_the_command_ends_with_a_report_of_the_pairs(base, tmp_path, capsys):
    path = write_recipe(tmp_path, base, merge={"output": str(tmp_path / "merged"), "out_dtype": "float32"})
    with pytest.raises(SystemExit, match="0"):
        main(["dpo", str(path), "training.max_steps=1"])
    report = DpoRecipe.load(path).output / "report.md"
    said = capsys.readouterr().out
    assert f"report: {report}" in said
    assert f"merged: {tmp_path / 'merged'}" in said
    assert "pairs whose chosen answer is preferred, against the reference" in report.read_text()


def test_precompute_only_fills_the_cache_and_the_next_start_goes_on(base, sft_adapter, tmp_path):
    path = write_recipe(tmp_path, base, lora={"stack_on": [str(sft_adapter)]})
    folder = start(path, precompute_only=True)
    assert folder.status == "paused"
    assert not (folder.path / "adapter").exists()
    folder = start(path)
    assert folder.status == "finished"
    first, second = folder.events("reference")
    assert (first["computed"], second["computed"], second["verified"]) == (32, 0, 16)
    with pytest.raises(RunFolderError, match="nothing is left to do"):
        start(path)


def test_a_dry_run_shows_the_plan_and_leaves_nothing(base, sft_adapter, tmp_path):
    path = write_recipe(tmp_path, base, lora={"stack_on": [str(sft_adapter)]}, data={"layout": "shared_prefix"})
    said = []
    dry_run(DpoRecipe.load(path), said.append)
    text = "\n".join(said)
    assert "plan: 4 steps of 4 pairs, 1.33 epochs" in text
    assert "memory on a GPU: peak" in text
    assert said[-1] == "dry run: no reference was taken and nothing was trained"
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_tokens_that_training_takes(base, tmp_path):
    for name in ("packed", "shared_prefix", "padded"):
        folder = start(write_recipe(tmp_path, base, name, data={"layout": name}, training={"max_steps": 3}))
        metrics = folder.read_json("metrics.json")
        assert metrics["plan"]["tokens"] == pytest.approx(metrics["training"]["tokens"], rel=0.02), name
        assert folder.events("train_log")[0]["loss"] == pytest.approx(0.693, abs=1e-3)


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_computed(tmp_path):
    folder = save_tiny_model("qwen3_moe", tmp_path / "base", torch.bfloat16)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(300)])
    tokenizer.save_pretrained(folder)
    rows = write_pairs(tmp_path / "pairs.jsonl", [{"prompt": "word299", "chosen": "a", "rejected": "b"}])
    routed = {"targets": ["experts"], "experts": "routed"}
    path = write_recipe(tmp_path, folder, data={"train": str(rows)}, lora=routed)
    with pytest.raises(DataError, match="the rows hold the token id"):
        start(path)


def test_runs_share_a_cache_and_another_adapter_misses(base, sft_adapter, tmp_path):
    cache = {"cache": str(tmp_path / "cache")}
    (tmp_path / "other").mkdir()
    plain = start(write_recipe(tmp_path, base, "plain", reference=cache), precompute_only=True)
    other_rank = start(write_recipe(tmp_path, base, "rank", reference=cache, lora={"rank": 3}), precompute_only=True)
    stacked = start(
        write_recipe(tmp_path, base, "stacked", reference=cache, lora={"stack_on": [str(sft_adapter)]}),
        precompute_only=True,
    )
    computed = [folder.events("reference")[0]["computed"] for folder in (plain, other_rank, stacked)]
    assert computed == [32, 0, 32]


KILLED_WHILE_SCORING = """
import os, signal
from moeft.training.preference.reference_cache import ReferenceCache
from tests.test_runs_dpo import start
put, done = ReferenceCache.put, []
def put_and_die(self, records):
    put(self, records)
    done.append(1)
    if len(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
ReferenceCache.put = put_and_die
start({path!r})
"""


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(base, tmp_path, monkeypatch):
    one_by_one = {"per_device_eval_batch_size": 1}
    whole = start(write_recipe(tmp_path, base, "whole", training=one_by_one))
    path = write_recipe(tmp_path, base, "killed", training=one_by_one)
    program = KILLED_WHILE_SCORING.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -signal.SIGKILL
    with monkeypatch.context() as patched:
        patched.setattr(MoeTrainer, "training_step", interrupted_at(4, MoeTrainer.training_step))
        with pytest.raises(KilledError):
            start(path)
    folder = start(path)
    first, second = folder.events("reference")  # the killed start had none yet
    assert (first["cached"], first["computed"]) == (10, 22)
    assert second["computed"] == 0
    assert folder.read_json("metrics.json")["training"]["resumed_from"] == "checkpoint-2"
    found, expected = (load_file(f.path / "adapter" / "adapter_model.safetensors") for f in (folder, whole))
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def interrupted_at(step, training_step):
    def interrupted(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise KilledError
        return training_step(self, *args, **kwargs)

    return interrupted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": "both"}, "an adapter in lora.stack_on"),
        ({"preference": {"loss": "dpo"}}, "preference.loss: found 'dpo'"),
        ({"preference": {"loss": "sigmoid_norm", "log_probs": "sum"}}, "take sigmoid for sums"),
        ({"preference": {"loss": "simpo", "max_chosen_drop": 1.0}}, "no max_chosen_drop with simpo"),
        ({"preference": {"bta": 0.1}}, "did you mean preference.beta"),
        ({"data": {"max_length": 1}}, "greater than or equal to 2"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(base, tmp_path, changes, reason):
    with pytest.raises(RecipeError, match=reason):
        DpoRecipe.load(write_recipe(tmp_path, base, **changes))
