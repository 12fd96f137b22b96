"""``moeft run``: stages in order, each once, resumed where they were; and the instruct-safe merge as one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from moeft.cli import main
from moeft.config import document
from moeft.config.pipeline import PipelineRecipe, steps
from moeft.errors import RecipeError, RunFolderError
from moeft.provenance import RunFolder
from moeft.runs import stages
from moeft.runs.pipeline import dry_run, run
from tests.tiny_checkpoints import disk_tensors
from tests.tiny_models import save_tiny_model
from tests.tiny_training import sums, tiny_tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
MERGE = {"merge_method": "linear", "models": [{"model": "one"}, {"model": "other"}]}
AGAIN = {"merge_method": "passthrough", "models": [{"model": "${first}"}], "parameters": {"scale": 0.5}}


@pytest.fixture
def folder(tmp_path):
    """Two models, of which one has a tokenizer, and rows."""
    for seed, name in enumerate(("one", "other")):
        save_tiny_model("qwen3_moe", tmp_path / name, torch.float32, seed=seed)
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(8)))
    return tmp_path


def load(folder: Path, made: dict, **rest: object) -> PipelineRecipe:
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"output": "out", "stages": made, **rest}, sort_keys=False))
    return PipelineRecipe.load(folder / "pipeline.yaml")


def test_stages_run_in_order_and_read_what_earlier_ones_made(folder):
    compare = {"models": {"base": "one", "merged": "${first}"}, "rows": {"sums": "rows.jsonl"}}
    recipe = load(folder, {"first": {"merge": MERGE}, "second": {"merge": AGAIN}, "scores": {"compare": compare}})
    done = run(recipe)
    assert done.status == "finished"
    first, second = disk_tensors(folder / "out" / "first"), disk_tensors(folder / "out" / "second")
    assert all(torch.equal(second[name], first[name] / 2) for name in first)
    report = (folder / "out" / "report.md").read_text()
    figures = done.read_json("metrics.json")["comparisons"]["scores"][0]["models"]
    assert f"| base | {figures['base']['sums, nats per token']:.4g} (" in report
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(folder / "out")])
    assert (folder / "out" / "report.md").read_text() == report
    with pytest.raises(RunFolderError, match="nothing is left to do"):
        run(recipe)


def test_an_interrupted_pipeline_goes_on_with_the_stage_that_was_interrupted(folder, monkeypatch):
    def interrupt(*stage: object) -> None:
        raise KeyboardInterrupt

    compare = {"models": {"one": "one"}, "rows": {"sums": "rows.jsonl"}}
    recipe = load(folder, {"first": {"merge": MERGE}, "scores": {"compare": compare}})
    with monkeypatch.context() as patch:
        patch.setitem(stages.KINDS, "compare", replace(stages.KINDS["compare"], run=interrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    before = (folder / "out" / "first" / "model.safetensors").stat()
    done = run(recipe)
    assert (folder / "out" / "first" / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert done.record["attempts"] == 2
    assert [e["name"] for e in done.events("stage") if e["status"] == "finished"] == ["first", "scores"]
    (folder / "rows.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"rows\.jsonl"):
        run(recipe)


def test_a_changed_recipe_file_of_a_stage_is_a_changed_input(folder):
    (folder / "merge.yaml").write_text(json.dumps(MERGE))
    recipe = load(folder, {"first": {"merge": {"recipe": "merge.yaml"}}, "second": {"merge": AGAIN}})
    run(recipe)
    (folder / "out" / "second" / "config.json").unlink()  # as if a kill had come before it
    record = folder / "out" / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"failed"'))
    (folder / "merge.yaml").write_text(json.dumps(MERGE | {"out_dtype": "float32"}))
    with pytest.raises(RunFolderError, match=r"merge\.yaml"):
        run(load(folder, {"first": {"merge": {"recipe": "merge.yaml"}}, "second": {"merge": AGAIN}}))


def test_stages_that_depend_on_the_seed_run_once_for_each(folder):
    thinned = {"merge_method": "dare_linear", "base_model": "one", "models": [{"model": "other"}], "seed": "${seed}"}
    made = {"first": {"merge": MERGE}, "thinned": {"merge": thinned}, "of-thinned": {"merge": AGAIN}}
    made["of-thinned"] = {"merge": {**AGAIN, "models": [{"model": "${thinned}"}]}}
    found = [(step.name, step.seed, step.folder) for step in steps(load(folder, made, seeds=[3, 5]))]
    out = folder / "out"
    assert found == [
        ("first", None, out / "first"),
        ("thinned", 3, out / "seed-3" / "thinned"),
        ("of-thinned", 3, out / "seed-3" / "of-thinned"),
        ("thinned", 5, out / "seed-5" / "thinned"),
        ("of-thinned", 5, out / "seed-5" / "of-thinned"),
    ]
    assert steps(load(folder, made, seeds=[3, 5]))[1].content["seed"] == 3


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"a": {"merge": {**MERGE, "models": [{"model": "${b}"}]}}, "b": {"merge": MERGE}},
            "expected what stands",
        ),
        ({"a": {"merge": {**MERGE, "seed": "${seed}"}}}, "add seeds"),
        ({"a": {"merg": MERGE}}, "expected one of: sft, "),
        ({"a": {"merge": {**MERGE, "modles": []}}}, 'did you mean "models"'),
        ({"a": {"merge": MERGE, "sft": {}}}, "one kind with its recipe in a"),
        ({"A b": {"merge": MERGE}}, "names of small letters"),
        ({"seed": {"merge": MERGE}}, "other than seed"),
        ({"seed-3": {"merge": MERGE}}, "another name than seed-3, which is that of the folder for a seed"),
        ({"a": {"sft": {"model": "one", "output": "x", "data": {"train": "rows.jsonl"}}}}, "output is given"),
        ({"a": {"sft": {"model": "one", "data": {"trian": "rows.jsonl"}}}}, "did you mean data.train"),
        ({"a": {"fisher": {"model": "one", "prompts": "rows.jsonl", "rows": 0}}}, "greater than or equal to 1"),
        ({"a": {"compare": {"models": {"one": "one"}}}}, "rows, tasks or tool_calls"),
        (
            {"a": {"compare": {"models": {"one": "one"}, "rows": {"piqa": "rows.jsonl"}, "tasks": [{"task": "piqa"}]}}},
            "no rows of its name",
        ),
        ({}, "at least 1"),
        (
            {"a": {"fisher": {"model": "one", "prompts": "rows.jsonl", "memory": "12 apples"}}},
            r"stages\.a: memory: '12 apples' is not a size",
        ),
        ({"a": {"export": {"model": "one", "types": ["q3_k"]}}}, r"stages\.a: types has 'q3_k'"),
        ({"a": {"scenes": {"rows": "rows.jsonl", "prose": ["speech"]}}}, r"stages\.a: prose is speech"),
        (
            {"a": {"evaluate": {"models": {"one": "one"}, "tasks": {"seens": None}}}},
            r"stages\.a: there is no task 'seens'",
        ),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_before_its_first_stage(folder, made, message):
    with pytest.raises(RecipeError, match=message):
        run(load(folder, made))
    assert not (folder / "out").exists()


def test_experts_may_wait_in_the_files_of_a_checkpoint_that_an_earlier_stage_packs(folder):
    tuned = {"model": "${packed}", "quantization": None, "memory": {"experts": "stream", "backing": "disk"}}
    tuned["data"] = {"train": "rows.jsonl"}
    said = []
    dry_run(load(folder, {"packed": {"quantize": {"model": "one"}}, "tuned": {"sft": tuned}}), said.append)
    assert said[1] == "[2/2] tuned: sft, waits for packed"


def test_a_dry_run_names_the_stages_that_others_wait_for(folder):
    made = {"seed-rows": {"scenes": {"rows": "rows.jsonl"}}, "thinned": {"merge": {**MERGE, "seed": "${seed}"}}}
    made["more"] = {"scenes": {"rows": "${seed-rows}/train.jsonl", "tools": "${thinned}/tools.json"}}
    said = []
    dry_run(load(folder, made, seeds=[3]), said.append)
    assert said == [
        "[1/3] seed-rows: scenes, ready",
        "[2/3] thinned of seed 3: merge, ready",
        "[3/3] more of seed 3: scenes, waits for seed-rows, thinned",
        "dry run: no stage was run",
    ]


def test_an_input_that_is_missing_is_named_before_the_first_stage(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(load(folder, {"first": {"merge": MERGE}, "b": {"merge": {**MERGE, "base_model": "nowhere"}}}))
    assert not (folder / "out" / "first").exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "gemma4-e4b-instruct-safe-merge.yaml",
            ["fisher", "subspace", "unprotected", "damped", "masked", "healed", "comparison"],
        ),
        ("gemma4-26b-capability-preserving.yaml", ["tuned", "comparison"]),
    ],
)
def test_the_full_sized_recipes_have_these_stages(recipe, expected):
    made = steps(PipelineRecipe.load(RECIPES / recipe))
    assert [step.name for step in made if step.seed in (None, 0)] == expected


def test_tuning_with_and_without_a_gate_is_compared_in_one_report(folder):
    tiny_tokenizer().save_pretrained(folder / "one")
    (folder / "one").rename(folder / "base")
    (folder / "rows").mkdir()
    rows = (folder / "rows.jsonl").read_text()
    for name in ("target", "target-heldout", "general-heldout"):
        (folder / "rows" / f"{name}.jsonl").write_text(rows)
    (folder / "rows" / "hellaswag.jsonl").write_text(
        json.dumps({"ctx": "1 +", "endings": ["1", "2"], "gold": 0}) + "\n"
    )
    (folder / "rows" / "texts.jsonl").write_text(json.dumps({"text": "one and one"}) + "\n")
    content = document.read(RECIPES / "demo-capability-preserving.yaml")
    for name in ("naive", "gated"):
        recipe = content["stages"][name]["sft"]
        recipe["train"] = [role for role in recipe["train"] if role != "mlp"]  # the tiny model has none
        recipe["training"] |= {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
    content["stages"]["gated"]["sft"]["gate"] = {"divergence": {"path": "rows/target.jsonl", "limit": 1e-9}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = run(PipelineRecipe.load(folder / "pipeline.yaml"))
    metrics = done.read_json("metrics.json")
    assert [training["stage"] for training in metrics["trainings"]] == ["naive", "gated"]
    assert metrics["trainings"][1]["gate"]["stopped"]["rolled_back_to"] == 0
    (comparison,) = metrics["comparisons"]["comparison"]
    base, naive, gated = comparison["models"].values()
    assert gated == base != naive  # the gate went back to the base
    changes = {row["task"]: row for row in comparison["against_first"]["attention, with the gate"]}
    assert changes["target"]["change"] == 0
    assert changes["target"]["num"] == 8
    report = (folder / "run" / "report.md").read_text()
    assert "stopped at step 2, went back to step 0" in report
    interval = comparison["intervals"]["base"]["target, nats per token"]
    assert f"{interval['value']:.4g} ({interval['low']:.4g} to {interval['high']:.4g}) (!)" in report
    assert "| target nats per token |" in report
    assert (folder / "run" / "gated" / "report.md").exists()


def test_the_instruct_safe_merge_runs_from_one_command_to_one_report(folder):
    tiny_tokenizer().save_pretrained(folder / "one")
    (folder / "one").rename(folder / "base")
    (folder / "rows").mkdir()
    rows = (folder / "rows.jsonl").read_text()
    for name in ("instruct", "instruct-heldout", "style-heldout", *(f"style-{part}" for part in range(4))):
        (folder / "rows" / f"{name}.jsonl").write_text(rows)
    content = document.read(RECIPES / "demo-instruct-safe-merge.yaml")
    style = document.read(RECIPES / "demo-style-sft.yaml")
    for recipe in (content["stages"]["instruct"]["sft"], style):
        recipe["training"] |= {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    content["stages"]["fisher"]["fisher"]["rows"] = 2
    content["stages"]["subspace"]["subspace"]["rank"] = 2
    del content["stages"]["comparison"]["compare"]["tool_calls"]
    content["seeds"] = [7]
    (folder / "demo-style-sft.yaml").write_text(yaml.safe_dump(style))
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = run(PipelineRecipe.load(folder / "pipeline.yaml"))
    comparison = done.read_json("metrics.json")["comparisons"]["comparison"]
    assert [found["seed"] for found in comparison] == [7]
    figures = comparison[0]["models"]
    assert len({figure["style, nats per token"] for figure in figures.values()}) == len(figures) == 8
    report = (done.path / "report.md").read_text()
    assert "| protected: damped, masked, healed |" in report
    events = RunFolder.open(done.path / "seed-7" / "masked").events("protection")
    assert events[0]["mode"] == "project"
