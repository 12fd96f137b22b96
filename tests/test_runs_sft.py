"""``moeft sft`` from recipe to run folder, on a tiny model: what it leaves, what it refuses, how it continues."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import moeft
from moeft.config import SftRecipe, validate_training_fields
from moeft.config.evaluation import Evaluation
from moeft.config.sft import Data
from moeft.errors import DataError, MoeftError, RecipeError, RunFolderError
from moeft.provenance import RunFolder
from moeft.runs.replies import HeldOutCalls
from moeft.runs.sft import run
from moeft.training.checkpoints import last_checkpoint
from moeft.training.sft import SFTConfig
from tests.tiny_models import save_tiny_model, token_ids
from tests.tiny_training import load, sums, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny bfloat16 checkpoint with its tokenizer."""
    folder = save_tiny_model("qwen3_moe", tmp_path_factory.mktemp("base"), torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_recipe(folder, base, name="run", **changes):
    rows = [*sums(), {"messages": [{"role": "user", "content": "alone"}]}, '{"prompt": "cut off']
    recipe = {
        "model": str(base),
        "output": name,
        "dtype": "float32",
        "quantization": {},
        "lora": {"rank": 4},
        "data": {
            "train": [str(write_rows(folder / "train.jsonl", rows))],
            "eval": str(write_rows(folder / "heldout.jsonl", sums(6, offset=1))),
            "max_reject_share": 0.1,
        },
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "max_skipped_steps": 3,
        },
    }
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if values and section in recipe else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(path):
    return run(SftRecipe.load(path), show=lambda text: None)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A whole run with a merge."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, base, merge={"output": str(folder / "merged")})
    return start(path), path


def test_merge_that_is_bound_to_fail_is_refused_before_training(base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    merge = {"output": str(tmp_path / "merged"), "base_model": str(other)}
    with pytest.raises(MoeftError, match="was trained on another base"):
        start(write_recipe(tmp_path, base, merge=merge))
    folder = RunFolder.open(tmp_path / "run")
    assert [stage["name"] for stage in folder.events("stage")] == ["load"]
    assert not list((tmp_path / "run").glob("mergeable-*"))


def test_run_leaves_adapter_metrics_events_and_rejects(finished):
    folder, _ = finished
    assert folder.status == "finished"
    record = json.loads((folder.path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["recipe"]["lora"]["rank"] == 4
    metrics = folder.read_json("metrics.json")
    assert metrics["heldout"]["after"]["loss"] < metrics["heldout"]["before"]["loss"]
    assert metrics["training"]["steps"] == 6
    assert metrics["training"]["skipped_steps"] == 0
    assert metrics["training"]["resumed_from"] is None
    assert metrics["training"]["tokens_per_second"] > 0
    assert metrics["training"]["peak_bytes"] > 0
    assert metrics["data"]["train_rows"] == 24
    assert metrics["data"]["rejected_rows"] == 2
    assert [event["step"] for event in folder.events("train_log")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in folder.events("checkpoint")] == [2, 4, 6]
    names = ["load", "measure before", "train", "save adapter", "measure after", "merge"]
    assert [event["name"] for event in folder.events("stage") if event["status"] == "finished"] == names


def test_rejected_rows_are_listed_with_their_lines(finished):
    folder, path = finished
    rejects = [json.loads(line) for line in (folder.path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [25, 26]
    assert "no assistant turn" in rejects[0]["reason"]
    assert "malformed JSON at column" in rejects[1]["reason"]
    assert {reject["source"] for reject in rejects} == {str(path.parent / "train.jsonl")}


def test_adapter_of_a_run_loads_on_the_base_it_names(finished, base):
    folder, _ = finished
    adapted = moeft.load_adapter(load(base, quantization_config=moeft.NF4Config()), folder.path / "adapter")
    with torch.no_grad(), adapted.disable_adapter():
        before = adapted(input_ids=token_ids()).logits
    assert not torch.equal(adapted(input_ids=token_ids()).logits, before)


def test_merged_checkpoint_loads_in_plain_transformers_and_holds_the_delta(finished, base):
    _, path = finished
    merged = load(path.parent / "merged")
    original = load(base)
    changed = {
        name.split(".", 3)[-1].removesuffix(".weight")
        for (name, new), old in zip(merged.named_parameters(), original.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    attention = {f"self_attn.{part}_proj" for part in "qkvo"}
    assert changed == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_second_start_of_a_finished_run_is_refused(finished):
    _, path = finished
    with pytest.raises(RunFolderError, match="nothing is left to do"):
        start(path)


def test_killed_run_continues_to_identical_weights_and_keeps_its_figures(base, tmp_path):
    steps = {"max_steps": 12, "save_steps": 3, "lr_scheduler_type": "linear"}
    more = {"path": str(write_rows(tmp_path / "more.jsonl", sums(5, offset=2))), "weight": 1, "epochs": 2}
    mixture = {"train": [{"path": str(tmp_path / "train.jsonl"), "weight": 2}, more]}
    whole = start(write_recipe(tmp_path, base, "whole", data=mixture, training=steps))
    path = write_recipe(tmp_path, base, "killed", data=mixture, training=steps)
    kill_after_first_checkpoint(path, tmp_path / "killed")
    killed = RunFolder.open(tmp_path / "killed")
    before = killed.read_json("metrics.json")["heldout"]["before"]
    assert killed.status == "running"
    assert not (killed.path / "adapter").exists()
    torn = tmp_path / "killed" / "checkpoints" / "checkpoint-999"  # as a kill in the middle of a save leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 99')
    continued = start(path)
    assert continued.record["attempts"] == 2
    ours, theirs = (load_file(r.path / "adapter" / "adapter_model.safetensors") for r in (continued, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    ours, theirs = continued.read_json("metrics.json"), whole.read_json("metrics.json")
    assert ours["heldout"]["before"] == before
    assert ours["heldout"] == theirs["heldout"]
    assert ours["training"]["resumed_from"] == "checkpoint-3"
    for figure in ("steps", "tokens", "skipped_steps"):
        assert ours["training"][figure] == theirs["training"][figure]
    assert ours["data"] == theirs["data"]
    assert [part["rows"] for part in ours["composition"]] == [20, 10]
    assert ours["composition"] == theirs["composition"]
    assert ours["bytes"] == theirs["bytes"]


KILLED_RUN = """
import os, signal, sys
from moeft.config import SftRecipe
from moeft.provenance import RunFolder
from moeft.runs.replies import HeldOutCalls
from moeft.runs.sft import run

record = RunFolder.event

def event(self, kind, **fields):
    record(self, kind, **fields)
    if kind == "train_log" and fields["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.event = event
run(SftRecipe.load(sys.argv[1]))
"""


def kill_after_first_checkpoint(path, output):
    """Start a run in a process that dies by SIGKILL at step 5, two steps after its first checkpoint."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert last_checkpoint(output / "checkpoints").name == "checkpoint-3"


def test_run_that_died_after_training_does_not_train_again(base, tmp_path):
    path = write_recipe(tmp_path, base)
    whole = start(path)
    figures = whole.read_json("metrics.json")
    adapter = load_file(whole.path / "adapter" / "adapter_model.safetensors")
    record = json.loads((whole.path / "run.json").read_text())
    (whole.path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    again = start(path)
    assert again.read_json("metrics.json")["training"] == figures["training"] | {"resumed_from": "checkpoint-6"}
    assert again.read_json("metrics.json")["heldout"] == figures["heldout"]
    for name, weight in load_file(again.path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(adapter[name], weight), name


def test_long_rows_are_truncated_when_the_recipe_says_so(base, tmp_path):
    long = {"prompt": "1 + 1?", "completion": "2" * 100}
    data = {"train": [str(write_rows(tmp_path / "long.jsonl", [*sums(7), long]))], "max_length": 64}
    rejecting = start(write_recipe(tmp_path, base, "reject", data=data, training={"max_steps": 1}))
    truncating = start(
        write_recipe(tmp_path, base, "truncate", data=data | {"on_too_long": "truncate"}, training={"max_steps": 1})
    )
    counts = [folder.read_json("metrics.json")["data"] for folder in (rejecting, truncating)]
    assert [(c["train_rows"], c["rejected_rows"]) for c in counts] == [(7, 1), (8, 0)]
    assert counts[1]["train_tokens"] - counts[0]["train_tokens"] == 64


def test_packed_run_reports_how_full_its_packs_are(base, tmp_path):
    rows = [*sums(), {"prompt": "1 + 1?", "completion": "2" * 100}]
    data = {"train": [str(write_rows(tmp_path / "rows.jsonl", rows))], "max_length": 64, "on_too_long": "split"}
    shown = []
    path = write_recipe(tmp_path, base, data=data | {"packing": True}, training={"max_steps": 1})
    counts = run(SftRecipe.load(path), show=shown.append).read_json("metrics.json")["data"]
    assert counts["shortened_rows"] == 1
    assert counts["train_rows"] > 25
    assert counts["packing_efficiency"] == counts["train_tokens"] / (64 * counts["packs"])
    assert f"packing: {counts['packs']} packs of 64 slots, {counts['packing_efficiency']:.1%} full" in shown


def test_run_that_failed_on_its_rows_starts_anew_once_they_are_mended(base, tmp_path):
    path = write_recipe(tmp_path, base, training={"max_steps": 1}, data={"max_reject_share": 0.0})
    with pytest.raises(DataError, match="2 of 26 rows"):
        start(path)
    mended = {"max_reject_share": 0.0, "train": str(write_rows(tmp_path / "mended.jsonl", sums()))}
    folder = start(write_recipe(tmp_path, base, training={"max_steps": 2}, data=mended))
    assert folder.record["attempts"] == 2
    assert folder.record["recipe"]["training"]["max_steps"] == 2
    assert folder.read_json("metrics.json")["training"]["steps"] == 2


def test_unknown_policy_is_refused_before_anything_is_written(base, tmp_path):
    path = write_recipe(tmp_path, base, training={"activation_checkpointing": "keep_norms"})
    with pytest.raises(RecipeError, match=r"training.activation_checkpointing is 'keep_norms', .*'keep_norm_inputs'\?"):
        start(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rat", "training.learning_rat: not an argument.*did you mean training.learning_rate?"),
        ("max_skiped_steps", "did you mean training.max_skipped_steps?"),
        ("on_too_long", "training.on_too_long: set it with `data.on_too_long`"),
        ("train_on", "training.train_on: set it with `data.train_on`"),
        ("resume_from_checkpoint", "set it with `output`"),
    ],
)
def test_training_key_that_cannot_be_used_is_refused_before_anything_is_written(base, tmp_path, name, message):
    path = write_recipe(tmp_path, base, training={name: 1})
    with pytest.raises(RecipeError, match=message):
        start(path)
    assert not (tmp_path / "run").exists()


def test_optimiser_and_adapter_dtype_of_the_recipe_reach_the_run(base, tmp_path):
    training = {"optim": "adamw_moeft_8bit", "optim_args": "min_8bit_size=0", "max_steps": 2, "loraplus_lr_ratio": 4}
    training |= {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.5}
    folder = start(write_recipe(tmp_path, base, lora={"dtype": "bfloat16"}, training=training))
    assert {t.dtype for t in load_file(folder.path / "adapter" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    saved = torch.load(folder.path / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert {state["exp_avg"].dtype for state in saved["state"].values()} == {torch.uint8}
    assert {state["master"].dtype for state in saved["state"].values()} == {torch.float32}
    # After the last step the schedule stands at its floor: half of 5e-3, and four times that for B.
    assert {group["lr"] for group in saved["param_groups"] if group["params"]} == {2.5e-3, 1e-2}


def test_optimiser_that_nobody_knows_is_refused_before_anything_is_written(base, tmp_path):
    path = write_recipe(tmp_path, base, training={"optim": "adamw_moft_8bit", "min_lr_ratio": 2})
    with pytest.raises(RecipeError) as caught:
        start(path)
    assert "training.optim is 'adamw_moft_8bit'" in str(caught.value)
    assert "did you mean 'adamw_moeft_8bit'?" in str(caught.value)
    assert "training.min_lr_ratio is 2, expected a number from 0 to 1" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_every_field_of_our_training_arguments_is_known_to_recipes():
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = [field.name for field in dataclasses.fields(SFTConfig) if field.name not in theirs]
    assert ours
    for name in ours:
        if name in Data.model_fields:
            with pytest.raises(RecipeError, match=f"set it with `data.{name}`"):
                validate_training_fields([name])
        else:
            validate_training_fields([name])


def test_merge_that_cannot_work_is_refused_before_training(base, tmp_path):
    moeft.checkpoint.quantize(base, tmp_path / "packed")
    path = write_recipe(tmp_path, tmp_path / "packed", quantization=None, merge={"output": str(tmp_path / "merged")})
    with pytest.raises(RecipeError, match=r"packed is quantised; set merge\.base_model"):
        start(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    path = write_recipe(tmp_path, base, merge={"output": str(tmp_path / "full")})
    with pytest.raises(RecipeError, match=r"merge\.output .* is not empty"):
        start(path)
    assert not (tmp_path / "run").exists()


def test_run_scores_calls_keeps_samples_and_proves_without_a_template_of_the_base(base, tmp_path):
    base = shutil.copytree(base, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    ask = {"role": "user", "content": "restart mail"}
    calls = [{"messages": [ask, {"role": "assistant", "content": '[TOOL: restart service="mail"]'}]}] * 6
    evaluation = {"tool_calls": str(write_rows(tmp_path / "calls.jsonl", calls)), "max_new_tokens": 4}
    merge = {"output": str(tmp_path / "merged"), "verify": True}
    metrics = start(write_recipe(tmp_path, base, evaluation=evaluation, merge=merge)).read_json("metrics.json")
    assert metrics["heldout"]["before"]["exact_match"] == metrics["heldout"]["after"]["exact_match"] == 0
    assert metrics["heldout"]["after"]["rows"] == 6
    assert [set(sample) for sample in metrics["samples"]] == [{"prompt", "reference", "before", "after"}] * 4
    assert len(metrics["proofs"]) == 5
    assert all(proof["ok"] for proof in metrics["proofs"])


def test_held_out_call_without_a_request_is_refused(tmp_path):
    lonely = {"messages": [{"role": "assistant", "content": '[TOOL: restart service="mail"]'}]}
    with pytest.raises(DataError, match="line 1: a held-out call needs a user's turn"):
        HeldOutCalls(write_rows(tmp_path / "calls.jsonl", [lonely]), Evaluation())
