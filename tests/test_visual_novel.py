"""The visual-novel recipes: the scaled-down one from rows to served files, and the stages that it is made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moeft.cli import main
from moeft.config import document
from moeft.config.pipeline import PipelineRecipe, steps
from moeft.config.stages import EvaluateRecipe, ExportRecipe, LayoutRecipe, ScenesRecipe
from moeft.errors import DataError, ProofError, RecipeError, RunFolderError
from moeft.provenance import RunFolder
from moeft.runs import evaluate, evaluations, export, layout, stages
from moeft.runs.pipeline import run
from tests.scripted_models import save_scripted_model
from tests.test_gguf_export import BASE
from tests.tiny_checkpoints import disk_tensors

RECIPES = Path(__file__).parent.parent / "recipes"
QUICK = [
    "stages.tuned.sft.training.max_steps=2",
    "stages.tuned.sft.training.per_device_train_batch_size=2",
    "stages.tuned.sft.training.use_cpu=true",
    "stages.tuned.sft.merge.verify=false",
    "stages.files.export.verify=false",
    "stages.written.evaluate.limit=3",
    "stages.written.evaluate.samples=2",
    "stages.written.evaluate.max_new_tokens=12",
]


def test_the_scaled_down_recipe_runs_from_dialogue_to_served_files(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    recipe = PipelineRecipe.load(RECIPES / "demo-visual-novel.yaml", [f"output={tmp_path / 'out'}", *QUICK])
    done = run(recipe, show=lambda line: None)
    metrics = done.read_json("metrics.json")
    (written,) = metrics["evaluations"]["written"]
    models = ["base q8_0", "tuned q8_0", "tuned q4_k_m"]
    assert list(written["evaluation"]) == models
    measured = {(row["task"], row["metric"]) for row in written["evaluation"]["tuned q4_k_m"]}
    assert {("scenes", name) for name in ("valid_protocol", "ttr", "mattr", "slop_per_1k_words")} <= measured
    assert all(row["low"] <= row["change"] <= row["high"] for row in written["differences"]["tuned q8_0"])
    # 4 layers: two stacks of experts; q, k, o everywhere and v in the three sliding ones.
    assert metrics["notes"]["canonical"] == [
        "66 of 89 tensors have the SHA-256 of the base's, the 23 others are among the trained ones"
    ]
    base, tuned = disk_tensors(BASE), disk_tensors(done.path / "canonical")
    assert sum(not base[name].equal(tuned[name]) for name in base) == 23
    assert (done.path / "files" / "q4_k_m.Modelfile").is_file()
    report = (done.path / "report.md").read_text()
    assert "### tuned q4_k_m beside base q8_0" in report
    assert "- canonical: 66 of 89 tensors" in report
    with pytest.raises(RunFolderError, match="nothing is left to do"):
        run(recipe)


def test_the_full_sized_recipe_has_the_stages_of_the_scaled_down_one():
    made = steps(PipelineRecipe.load(RECIPES / "gemma4-26b-visual-novel.yaml"))
    scaled_down = document.read(RECIPES / "demo-visual-novel.yaml")["stages"]
    assert [step.name for step in made] == list(scaled_down)


def test_a_layout_that_changes_more_than_was_trained_is_no_proof(tmp_path):
    shutil.copytree(BASE, tmp_path / "other")
    raw = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(raw)
    layout.run(LayoutRecipe(direction="unfuse", model=BASE), tmp_path / "apart", lambda line: None)
    last = max(
        json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).items(),
        key=lambda item: item[1].get("data_offsets", [0, 0])[1],
    )[0]
    recipe = LayoutRecipe(direction="fuse", model=tmp_path / "apart", base=tmp_path / "other")
    with pytest.raises(ProofError, match=f"1 tensors differ .*{last}"):
        layout.run(recipe, tmp_path / "fused", lambda line: None)
    assert not stages.KINDS["layout"].is_done(tmp_path / "fused")
    # The conversion is not made again.
    before = (tmp_path / "fused" / "model.safetensors").stat().st_mtime_ns
    allowed = recipe.model_copy(update={"changed": (f"{last}$",)})
    layout.run(allowed, tmp_path / "fused", lambda line: None)
    assert (tmp_path / "fused" / "model.safetensors").stat().st_mtime_ns == before
    assert stages.KINDS["layout"].is_done(tmp_path / "fused")
    with pytest.raises(ProofError, match="only one of both checkpoints has"):
        layout.run(recipe.model_copy(update={"base": tmp_path / "apart"}), tmp_path / "fused", lambda line: None)


SPOKEN = '[TOOL: say speaker="A" text="Good evening."]'


def test_a_gguf_file_is_served_while_it_is_evaluated(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    from moeft import gguf
    from moeft.tool_protocols.scenes import TOOLS

    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}<go>"
    model = save_scripted_model(
        tmp_path / "model", [["<go>", SPOKEN]], end="<end>", template=template, special=["<go>"]
    )
    gguf.export(model, tmp_path / "m.gguf", type="f16")
    row = {"prompt": "a", "protocol": "bracket", "prose": "text", "tools": TOOLS}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "b"}) + "\n")
    out = tmp_path / "out"
    words = ["evaluate", str(tmp_path / "m.gguf"), "--tasks", f"scenes={tmp_path / 'prompts.jsonl'}", "--out", str(out)]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--samples", "3", "--temperature", "0.5", "--batch-size", "2", "--max-length", "256"])
    (task,) = RunFolder.open(out).read_json("results.json")["tasks"]
    valid = next(metric for metric in task["metrics"] if metric["name"] == "valid_protocol")
    assert (valid["value"], valid["num"]) == (1, 2)
    assert task["figures"]["1"]["words"] == [6, 3]
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--adapter", str(tmp_path)])


@pytest.mark.parametrize(
    ("recipe", "check", "message"),
    [
        (ExportRecipe(model=BASE, types=("q3_k",)), export.check, "expected some of f32"),
        (ExportRecipe(model=BASE, types=("q8_0", "q8_0")), export.check, "each once"),
        (ExportRecipe(model=BASE, adapter=BASE, verify=True), export.check, "merge it in a stage"),
        (EvaluateRecipe(models={"a": BASE}, tasks={"seens": None}), evaluations.check, "no task 'seens'"),
        (EvaluateRecipe(models={"a": BASE}, tasks={"scenes": None}, samples=2), evaluations.check, "set one"),
    ],
)
def test_a_stage_that_cannot_run_is_refused_before_the_first_one(recipe, check, message):
    with pytest.raises(RecipeError, match=message):
        check(recipe)


def test_a_served_file_is_not_asked_for_log_probabilities(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a text"}\n')
    recipe = EvaluateRecipe(models={"a": Path("m.gguf")}, tasks={"perplexity": tmp_path / "rows.jsonl"})
    with pytest.raises(RecipeError, match=r"task perplexity wants log-probabilities .* a, a GGUF file"):
        evaluations.check(recipe)


def write_questions(folder, count):
    (folder / "piqa").mkdir(parents=True, exist_ok=True)
    row = json.dumps({"goal": "1 + 1", "sol1": "2", "sol2": "3", "label": 0}) + "\n"
    (folder / "piqa" / "rows.jsonl").write_text(count * row)


def test_the_stage_asks_what_the_command_would_and_on_a_gpu_if_there_is_one(tmp_path, monkeypatch):
    asked = []

    def stop(settings, out, batch_size, device, show):
        asked.append((settings.shots, settings.tool_protocol, device))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    write_questions(tmp_path / "tasks", 3)
    asks = {"tasks": {"piqa": None}, "data": tmp_path / "tasks", "shots": 2, "tool_protocol": "gemma"}
    recipe = EvaluateRecipe(models={"a": BASE}, **asks)
    with pytest.raises(KeyboardInterrupt):
        evaluations.run(recipe, tmp_path / "out", lambda line: None)
    assert asked == [(2, "gemma", "cuda")]
    write_questions(tmp_path / "tasks", 4)
    with pytest.raises(RunFolderError, match="rows piqa"):
        evaluations.run(recipe, tmp_path / "out", lambda line: None)


def test_tasks_of_the_data_folder_are_checked_before_the_first_stage(tmp_path):
    recipe = EvaluateRecipe(models={"a": BASE}, tasks={"piqa": None}, data=tmp_path, shots=2)
    evaluations.check(recipe.model_copy(update={"data": tmp_path / "made by an earlier stage"}))
    with pytest.raises(DataError, match="holds no piqa"):
        evaluations.check(recipe)
    write_questions(tmp_path, 2)
    with pytest.raises(DataError, match="all of its 2 rows are examples"):
        evaluations.check(recipe)


@pytest.mark.parametrize(
    ("recipe", "content", "message"),
    [
        (LayoutRecipe, {"direction": "fuse", "model": "m", "changed": ["experts("]}, r"not 'experts\('"),
        (LayoutRecipe, {"direction": "fuse", "model": "m", "changed": ["experts"]}, "expected base, the checkpoint"),
        (ScenesRecipe, {"rows": "rows.jsonl", "protocol": "xml"}, "found 'xml', expected 'bracket', 'gemma'"),
    ],
    ids=["no expression", "no base", "no protocol"],
)
def test_a_recipe_of_a_stage_that_makes_no_sense_is_refused(recipe, content, message):
    with pytest.raises(RecipeError, match=message):
        recipe.from_content(content, "stages.a", Path())
