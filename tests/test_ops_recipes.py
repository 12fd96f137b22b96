"""The shipped recipes: each can be read, and the ops agent's runs from one command to one report on a stand-in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from moeft.cli import main
from moeft.config import SftRecipe, document
from moeft.config.pipeline import PipelineRecipe, steps
from moeft.config.sft import Quantization
from moeft.data import templates
from moeft.demo.ops_agent import generate, write_jsonl
from moeft.demo.ops_schema import ops_tools
from moeft.errors import RecipeError
from moeft.planning import plan
from moeft.planning.settings import read_settings
from moeft.provenance.files import read_lines
from moeft.runs import stages
from moeft.runs.pipeline import dry_run, run
from moeft.tool_protocols import PROTOCOLS
from tests.test_planning import GEMMA_26B
from tests.tiny_models import save_tiny_model
from tests.tiny_preferences import pairs, write_pairs
from tests.tiny_training import sums, tiny_tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
OPS = RECIPES / "gemma4-26b-rtx3090-ops.yaml"
ALONE = [path for path in sorted(RECIPES.glob("*.yaml")) if "${" not in path.read_text("utf-8")]
PIPELINES = [path for path in sorted(RECIPES.glob("*.yaml")) if "stages" in document.read(path)]
TOOLS = ("drain_node", "reboot_host")


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_stage_of_a_shipped_pipeline_can_be_read(path):
    for step in steps(PipelineRecipe.load(path)):
        check = stages.KINDS[step.kind].check
        recipe = stages.read(step)
        if check is not None:
            check(recipe)


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.name)
def test_every_other_shipped_recipe_can_be_read(path):
    SftRecipe.load(path)


def test_what_is_neither_is_part_of_a_pipeline():
    text = "".join(path.read_text("utf-8") for path in PIPELINES)
    for path in set(RECIPES.glob("*.yaml")) - {*ALONE, *PIPELINES}:
        assert path.name in text


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_ops_recipe_fits_a_card_of_24_gigabytes(name):
    (step,) = (step for step in steps(PipelineRecipe.load(OPS)) if step.name == name)
    settings = replace(read_settings(stages.read(step)), quantization=Quantization(attention=True, mlp=True))
    forecast = plan({"model_type": "gemma4_text", **GEMMA_26B}, vram="24GiB", recipe=settings)
    # Two adapters may lie below the one that trains.
    below = 2 * (forecast.bytes_of("adapter attention") + forecast.bytes_of("adapter experts"))
    assert forecast.device_bytes + below < forecast.vram_bytes


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Everything that the ops recipe reads, tiny, and the recipe itself."""
    folder = tmp_path_factory.mktemp("ops")
    base = save_tiny_model("gemma4", folder / "gemma-4-26B-A4B-it", torch.bfloat16)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates.text_of("gemma4")
    tokenizer.save_pretrained(base)
    (folder / "rows").mkdir()
    for name, rows in zip(("calls", "calls-heldout"), generate(0, 300, 60), strict=True):
        found = [row for row in rows if row["messages"][1]["content"].split()[1] in TOOLS][:12]
        write_jsonl([native(row) for row in found], folder / "rows" / f"{name}.jsonl")
    write_pairs(folder / "rows" / "easy-pairs.jsonl", pairs(14))
    write_pairs(folder / "rows" / "general.jsonl", sums(4))
    (folder / "tools.json").write_text(json.dumps(schemas()))
    (folder / OPS.name).write_text(OPS.read_text("utf-8"))
    return folder


def schemas():
    return [tool for tool in ops_tools() if tool["function"]["name"] in TOOLS]


def native(row):
    """A row whose call is one of the chat template's."""
    (call,) = PROTOCOLS["bracket"].parse(row["messages"][1]["content"]).calls
    function = {"name": call.name, "arguments": dict(call.arguments)}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return {"messages": [row["messages"][0], answer], "tools": schemas()}


def test_a_dry_run_checks_every_stage_and_leaves_nothing(stand_in, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(stand_in / OPS.name), "--dry-run"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "[1/6] packed: quantize, ready" in printed
    assert "[2/6] sft: sft, waits for packed" in printed
    assert "[6/6] rounds: hard-rounds, waits for dpo, packed, sft" in printed
    assert not (stand_in / "runs").exists()


@pytest.mark.parametrize(
    ("stage", "section", "key", "reason"),
    [
        ("rounds", "training", "max_stepz", r"stages\.rounds: .*did you mean training\.max_steps"),
        ("dpo", "training", "optimm", r"stages\.dpo: .*did you mean training\.optim"),
        ("dpo", "preference", "bta", r"did you mean preference\.beta"),
        ("pairs", None, "shar", "shar"),
    ],
)
def test_a_typo_in_a_late_stage_is_found_before_the_first_one(stand_in, tmp_path, stage, section, key, reason):
    content = json.loads(json.dumps(document.read(OPS)))  # without the sections that stages share
    (recipe,) = content["stages"][stage].values()
    (recipe if section is None else recipe[section])[key] = 1
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match=f"(?s){reason}"):
        run(PipelineRecipe.load(path))
    assert not (tmp_path / "runs").exists()


def test_an_input_that_is_missing_is_named_by_a_dry_run(tmp_path):
    (tmp_path / OPS.name).write_text(OPS.read_text("utf-8"))
    with pytest.raises(FileNotFoundError, match="gemma-4-26B-A4B-it"):
        dry_run(PipelineRecipe.load(tmp_path / OPS.name))


def test_the_ops_recipe_runs_from_one_command_to_one_report(stand_in):
    content = document.read(OPS)
    content["output"] = "small"
    recipes = {name: next(iter(stage.values())) for name, stage in content["stages"].items()}
    for name in ("sft", "dpo", "rounds"):
        recipes[name]["training"] |= {"max_steps": 1, "gradient_accumulation_steps": 2, "use_cpu": True}
        recipes[name]["training"] |= {"disable_tqdm": True}
        recipes[name]["dtype"] = "float32"
    recipes["pairs"]["count"], recipes["heldout-pairs"]["count"] = 6, 2
    recipes["rounds"]["data"] |= {"pairs": 2, "probes": 2, "max_new_tokens": 2}
    path = stand_in / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    done = run(PipelineRecipe.load(path), show=lambda text: None)
    rows = read_lines(done.path / "pairs" / "pairs.jsonl")
    assert sum("category" in row for row in rows) == pytest.approx(0.3 * len(rows), abs=1)
    metrics = done.read_json("metrics.json")
    (rounds,) = metrics["rounds"]["rounds"]
    assert rounds["ended"] == "held-out accuracy changed by +0.0%, no more than 0.5%"
    assert len(rounds["rounds"]) == 2
    assert (done.path / rounds["picture"]).stat().st_size > 1000
    assert [(of["stage"], of["report"]) for of in metrics["trainings"]] == [
        ("sft", "sft/report.md"),
        ("dpo", "dpo/report.md"),
    ]
    report = (done.path / "report.md").read_text("utf-8")
    assert "| [sft](sft/report.md) |" in report
    assert "| [dpo](dpo/report.md) |" in report
    assert "## dpo: held-out pairs" in report
    assert "## rounds: rounds" in report
    merged = done.path / "rounds" / "merged" / "config.json"
    assert "quantization_config" not in json.loads(merged.read_text("utf-8"))
