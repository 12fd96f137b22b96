"""``moeft fisher`` and ``moeft subspace`` as commands, and a recipe that trains beside what they found."""

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
from safetensors import safe_open
from safetensors.torch import load_file

from moeft.cli import main
from moeft.config import SftRecipe
from moeft.errors import DataError, RunFolderError
from moeft.merging import merge
from moeft.provenance import RunFolder
from moeft.runs.fisher import FisherSettings, run
from moeft.runs.measured import load
from moeft.runs.own_replies import own_replies, read_prompts
from moeft.runs.sft import run as run_sft
from tests.tiny_models import save_tiny_model
from tests.tiny_training import sums, tiny_tokenizer

FISHER_FILE, LAYERS = "fisher.safetensors", "layer_importance.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Instruct model with its tokenizer, and the base of it, in bfloat16; rows of chat."""
    root = tmp_path_factory.mktemp("importance")
    for seed, name in enumerate(("it", "pt")):
        save_tiny_model("qwen3_moe", root / name, torch.bfloat16, seed=seed)
    tiny_tokenizer().save_pretrained(root / "it")
    rows = [*sums(12), {"messages": [{"role": "user", "content": "alone"}]}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def call(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module")
def measured(checkpoints):
    """Folder of a Fisher run and file of a subspace, both made by commands."""
    root = checkpoints
    fisher = ("fisher", root / "it", "--prompts", root / "rows.jsonl", "-n", 5, "--out", root / "fisher")
    assert call(*fisher, "--memory", "100KiB") == 0
    assert call("subspace", root / "it", root / "pt", "--rank", 4, "--out", root / "subspace.safetensors") == 0
    return root


def test_fisher_leaves_a_finished_run_with_weights_layers_and_a_picture(measured):
    folder = RunFolder.open(measured / "fisher")
    assert folder.status == "finished"
    assert folder.read_json("metrics.json")["fisher"]["samples"] == 5
    assert folder.path.joinpath("layer_importance.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder.path / "rejects.jsonl").read_text())["line"] == 13
    found = load_file(folder.path / "fisher.safetensors")
    on_disk = load_file(measured / "it" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, torch.bfloat16) for name, t in on_disk.items() if "_proj" in name
    }


def test_fisher_of_a_base_without_template_takes_that_of_its_family(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "it", tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "base" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    lines = []
    run(FisherSettings(tmp_path / "base", checkpoints / "rows.jsonl", 1), tmp_path / "run", 1 << 20, show=lines.append)
    assert lines[0] == "chat template: qwen3, shipped with moeft"


def test_fisher_takes_the_template_that_it_is_given_and_refuses_a_name_that_is_none(checkpoints, tmp_path):
    lines = []
    settings = FisherSettings(checkpoints / "it", checkpoints / "rows.jsonl", 1, chat_template="chatml")
    run(settings, tmp_path / "run", 1 << 20, show=lines.append)
    assert lines[0] == "chat template: chatml, shipped with moeft"
    with pytest.raises(DataError, match="chatlm is no file and no name of a chat template"):
        run(dataclasses.replace(settings, chat_template="chatlm"), tmp_path / "other", 1 << 20)
    assert not (tmp_path / "other").exists()


def test_merge_is_damped_by_the_files_of_fisher(measured, tmp_path):
    files = {key: measured / "fisher" / name for key, name in (("fisher", FISHER_FILE), ("layer_importance", LAYERS))}
    models = {"base_model": measured / "it", "models": [{"model": str(measured / "pt")}]}
    recipe = {key: str(value) if key != "models" else value for key, value in (models | files).items()}
    merge(recipe | {"merge_method": "fisher_damped", "out_dtype": "float32"}, tmp_path / "out", progress=False)
    merged, base, tuned = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", measured / "it", measured / "pt")
    )
    layers = json.loads(files["layer_importance"].read_text())["layers"]
    low, high = min(layers.values()), max(layers.values())
    for name, value in load_file(files["fisher"]).items():
        f = value.float()
        f = (f - f.min()) / (f.max() - f.min()) if f.max() > f.min() else torch.zeros_like(f)
        kept = (1 - f) * (high - layers[name.split(".")[2]]) / (high - low)
        expected = base[name].float() + kept * (tuned[name].float() - base[name].float())
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_recipe_protects_the_instruct_model(measured, tmp_path):
    recipe = {
        "model": str(measured / "it"),
        "output": "run",
        "dtype": "float32",
        "quantization": {},
        "lora": {"rank": 2},
        "data": {"train": str(measured / "rows.jsonl"), "max_reject_share": 0.1},
        "protection": {
            "subspace": str(measured / "subspace.safetensors"),
            "layer_importance": str(measured / "fisher" / "layer_importance.json"),
        },
        "training": {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True, "save_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = run_sft(SftRecipe.load(tmp_path / "recipe.yaml"), show=lambda line: None)
    assert folder.events("protection")[0]["mode"] == "project"
    assert {"protection.subspace", "protection.layer_importance"} <= folder.record["inputs"].keys()
    layers = json.loads((measured / "fisher" / "layer_importance.json").read_text())["layers"]
    most = max(layers, key=layers.__getitem__)
    b = load_file(folder.path / "adapter" / "adapter_model.safetensors")
    b = b[f"base_model.model.model.layers.{most}.self_attn.q_proj.lora_B.weight"]
    u = load_file(measured / "subspace.safetensors")[f"model.layers.{most}.self_attn.q_proj.weight.U"]
    assert float((u.T @ b).norm()) < 1e-5 * float(b.norm())


KILLED = """
import sys
from pathlib import Path
from moeft.importance import tensor_file
from moeft.runs.fisher import FisherSettings, run
commit, count = tensor_file.TensorFile.commit, 0
def commit_or_die(self, *args, **kwargs):
    global count
    commit(self, *args, **kwargs)
    count += 1
    if count == 3:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
tensor_file.TensorFile.commit = commit_or_die
model, rows, out = map(Path, sys.argv[1:])
run(FisherSettings(model, rows, 5), out, 100 << 10, show=lambda line: None)
"""


def test_fisher_goes_on_after_a_kill(measured, tmp_path):
    arguments = (measured / "it", measured / "rows.jsonl", tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run" / "fisher.safetensors").exists()
    model, rows, out = arguments
    with pytest.raises(RunFolderError, match="rows was 5, is now 6"):
        run(FisherSettings(model, rows, 6), out, 1 << 20)
    run(FisherSettings(model, rows, 5), out, 1 << 20, show=lambda line: None)
    whole = load_file(measured / "fisher" / "fisher.safetensors")
    assert all(torch.equal(whole[name], value) for name, value in load_file(out / "fisher.safetensors").items())
    with pytest.raises(RunFolderError, match="nothing is left to do"):
        run(FisherSettings(model, rows, 5), out, 1 << 20)


def test_run_that_lacks_only_its_picture_draws_it(measured, tmp_path):
    shutil.copytree(measured / "fisher", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    (tmp_path / "run" / "layer_importance.png").unlink()
    run(FisherSettings(measured / "it", measured / "rows.jsonl", 5), tmp_path / "run", 1)
    assert (tmp_path / "run" / "layer_importance.png").exists()


@pytest.fixture
def prompts(tmp_path):
    lines = [{"key": i, "prompt": f"What is {i} + {i}?"} for i in range(8)]
    lines.append({"messages": [*({"role": r, "content": r} for r in ("system", "user", "assistant"))]})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "prompts.jsonl"


def test_fisher_of_prompts_alone_is_that_of_the_models_own_replies(measured, prompts, tmp_path):
    settings = FisherSettings(measured / "it", prompts, 9, labels="generated", max_new_tokens=6)
    run(settings, tmp_path / "run", 1 << 30, show=lambda line: None)
    said = {
        line["prompt"]: line["reply"]
        for line in map(json.loads, (tmp_path / "run/replies.jsonl").read_text().splitlines())
    }
    assert said.keys() == set(range(9))
    asked = [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(8)]
    asked.append([{"role": "system", "content": "system"}, {"role": "user", "content": "user"}])
    rows = [{"messages": [*asked[i], {"role": "assistant", "content": said[i]}]} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(FisherSettings(measured / "it", tmp_path / "rows.jsonl", 9), tmp_path / "same", 1 << 30, show=lambda line: None)
    found, expected = (load_file(tmp_path / name / FISHER_FILE) for name in ("run", "same"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with safe_open(tmp_path / "run" / FISHER_FILE, "pt") as file:
        assert file.metadata()["labels"] == "generated"


def test_replies_that_are_kept_are_not_drawn_again(measured, prompts, tmp_path):
    model, tokenizer = load(measured / "it", "float32", "cpu", print)
    kept, options = tmp_path / "replies.jsonl", {"count": 5, "max_new_tokens": 4, "seed": 3}
    asked = read_prompts(prompts)
    first = own_replies(model, tokenizer, asked, kept, **options)
    assert own_replies(model, tokenizer, asked, tmp_path / "other.jsonl", **options) == first
    lines = [json.dumps(json.loads(line) | {"reply": "kept"}) for line in kept.read_text().splitlines()]
    kept.write_text("\n".join([*lines[:3], lines[3][:10]]))  # the fourth was torn
    second = own_replies(model, tokenizer, asked, kept, **options)
    assert [row["messages"][-1]["content"] for row in second].count("kept") == 3
    assert len(kept.read_text().splitlines()) == 5


def test_prompts_that_cannot_be_used_are_named(measured, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    for line in ({"question": "x"}, {"prompt": " "}, {"messages": [{"role": "assistant", "content": "x"}]}):
        path.write_text('{"prompt": "fine"}\n' + json.dumps(line) + "\n")
        with pytest.raises(DataError, match=r"prompts.jsonl line 2 has the keys .*; expected prompt, a text"):
            read_prompts(path)
    path.write_text('{"prompt": "fine"}\n')
    assert call("fisher", measured / "it", "--prompts", path, "--out", tmp_path / "out") == 1
    assert "labels generated measures prompts without replies" in capsys.readouterr().err
    with pytest.raises(DataError, match="there are no prompts"):
        own_replies(None, None, [], tmp_path / "kept.jsonl", count=1, max_new_tokens=1, seed=0)


def test_command_says_what_is_wrong(measured, tmp_path, capsys):
    assert call("fisher", measured / "pt", "--prompts", measured / "rows.jsonl", "--out", tmp_path / "a") == 1
    assert "holds no tokenizer" in capsys.readouterr().err
    assert call("subspace", measured / "it", measured / "pt", "--rank", 99, "--out", tmp_path / "b") == 1
    assert "rank is 99, but model.layers.0" in capsys.readouterr().err
