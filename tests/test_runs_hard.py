"""``moeft hard`` from files to files: pairs, an analysis with its picture, and one whole round of the loop."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

from moeft.cli import main
from moeft.config.iterate import IterateRecipe
from moeft.data.preferences import read_preferences
from moeft.demo.ops_agent import generate, write_jsonl
from moeft.demo.ops_schema import ops_tools
from moeft.errors import DataError, RecipeError
from moeft.provenance.files import read_lines
from moeft.runs.iterate import run
from moeft.runs.rounds import best_round, reason_to_stop
from tests.tiny_models import save_tiny_model
from tests.tiny_preferences import pairs, write_pairs
from tests.tiny_training import sums, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tools, seeds and held-out requests of the ops agent."""
    folder = tmp_path_factory.mktemp("ops")
    train, held_out = generate(0, 60, 15)
    write_jsonl(train, folder / "seeds.jsonl")
    write_jsonl(held_out, folder / "heldout.jsonl")
    (folder / "tools.json").write_text(json.dumps(ops_tools()))
    return folder


def command(*words):
    with pytest.raises(SystemExit) as stop:
        main(["hard", *map(str, words)])
    return stop.value.code


def test_build_mixes_hard_pairs_with_easy_ones_and_prints_counts(files, tmp_path, capsys):
    easy = write_pairs(tmp_path / "easy.jsonl", [*pairs(80), {"prompt": "x", "chosen": "y", "rejected": "y"}])
    out = tmp_path / "pairs.jsonl"
    words = ("build", "--tools", files / "tools.json", "--seeds", files / "seeds.jsonl", "--out", out, "-n", 30)
    assert command(*words, "--easy", easy, "--exclude", files / "heldout.jsonl") == 0
    rows = read_lines(out)
    assert (len(rows), sum("category" in row for row in rows)) == (100, 30)
    assert len(read_preferences(out).rows) == 100
    printed = capsys.readouterr().out
    assert "tool_confusion               3" in printed
    assert "30 hard (30%)" in printed
    assert command(*words) == 1
    assert "is there already" in capsys.readouterr().err


def test_analyze_reads_replies_and_leaves_tables_a_picture_and_targets(files, tmp_path, capsys):
    rows = read_lines(files / "heldout.jsonl")
    replies = [row["messages"][-1]["content"] for row in rows]
    replies[0] = "I'm sorry, I can't."
    outputs = tmp_path / "outputs.jsonl"
    outputs.write_text("".join(json.dumps({"reply": reply}) + "\n" for reply in replies))
    out = tmp_path / "analysis"
    words = ("analyze", "--tools", files / "tools.json", "--benchmark", files / "heldout.jsonl", "--out", out)
    assert command(*words, "--outputs", outputs) == 0
    text = (out / "failures.md").read_text()
    assert "refusal_when_answerable | 1" in text
    assert (out / "confusion.png").stat().st_size > 1000
    assert json.loads((out / "analysis.json").read_text())["failures"] == {"refusal_when_answerable": 1}
    built = tmp_path / "next.jsonl"
    words = ("build", "--tools", files / "tools.json", "--seeds", files / "seeds.jsonl", "--out", built, "-n", 40)
    assert command(*words, "--targets", out / "targets.json") == 0
    categories = [row["category"] for row in read_lines(built)]
    assert categories.count("refusal_when_answerable") > 20
    assert command(*words[:-4], "--out", tmp_path / "x.jsonl", "--targets", out / "analysis.json") == 1
    assert "holds no targets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not valid JSON"), ('[{"name": "a"}, {"name": "a"}]', "names must differ"), ("[]", "there are no tools")],
)
def test_schemas_that_cannot_be_used_are_named_with_their_file(files, tmp_path, capsys, content, reason):
    tools = tmp_path / "tools.json"
    tools.write_text(content)
    assert command("build", "--tools", tools, "--seeds", files / "seeds.jsonl", "--out", tmp_path / "o.jsonl") == 1
    error = capsys.readouterr().err
    assert "tools.json" in error
    assert reason in error


def write_rounds(folder, files, **changes):
    """A recipe of rounds on a tiny model."""
    base = save_tiny_model("qwen3_moe", folder / "base", torch.bfloat16)
    tiny_tokenizer().save_pretrained(base)
    recipe = {
        "model": str(base),
        "output": "run",
        "dtype": "float32",
        "lora": {"rank": 2},
        "data": {
            "tools": str(files / "tools.json"), "seeds": str(files / "seeds.jsonl"),
            "heldout": str(files / "heldout.jsonl"), "pairs": 13, "probes": 3, "max_new_tokens": 3, "max_length": 1500,
        },
        "preference": {"loss": "sigmoid_norm", "beta": 1.0},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True,
                     "save_strategy": "no"},
        "rounds": 2,
    }  # fmt: skip
    path = folder / "iterate.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def test_a_round_of_the_loop_probes_builds_tunes_and_measures(files, tmp_path):
    gate = write_pairs(tmp_path / "gate.jsonl", sums(4))
    path = write_rounds(tmp_path, files, gate={"rows": str(gate), "max_rise": 5.0})
    folder = run(IterateRecipe.load(path), show=lambda text: None)
    metrics = folder.read_json("metrics.json")
    # A tiny random model never calls a tool, so the first round gains nothing, and is the last.
    assert metrics["ended"] == "held-out accuracy changed by +0.0%, no more than 0.0%"
    assert (len(metrics["rounds"]), metrics["best"], metrics["adapters"]) == (2, 0, [])
    assert metrics["rounds"][1]["gate_loss"] > 0
    assert (folder.path / "rounds.png").stat().st_size > 1000
    assert (folder.path / "round-1" / "dpo" / "adapter" / "adapter_model.safetensors").is_file()
    held_out = {row["messages"][0]["content"] for row in read_lines(files / "heldout.jsonl")}
    rows = read_lines(folder.path / "round-1" / "pairs.jsonl")
    assert held_out.isdisjoint(message["content"] for row in rows for message in row["prompt"])


def test_the_capability_gate_of_a_round_ends_the_loop(files, tmp_path):
    general = write_pairs(tmp_path / "general.jsonl", sums(4))
    gate = {"divergence": {"path": str(general), "limit": 1e-12}, "every_steps": 1, "budget": None, "action": "stop"}
    said = []
    template = tmp_path / "own.jinja"
    template.write_text(tiny_tokenizer().chat_template)
    path = write_rounds(tmp_path, files, training_gate=gate, merge={"output": "merged"})
    folder = run(IterateRecipe.load(path, ["training.max_steps=9", f"data.chat_template={template}"]), said.append)
    assert {"training_gate.divergence", "chat_template"} <= set(folder.record["inputs"])
    metrics = folder.read_json("metrics.json")
    assert metrics["ended"].startswith("the capability gate stopped round 1: divergence is ")
    assert metrics["rounds"][1]["stopped"]["step"] == 1
    assert (metrics["best"], metrics["adapters"]) == (0, [])
    assert said[-1] == "nothing to merge: the best round is 0, which has no adapter"


def rounds_recipe(folder, **changes):
    content = {
        "model": folder, "output": folder, "rounds": 3, "min_gain": 0.01,
        "data": {"tools": folder, "seeds": folder, "heldout": folder},
        "gate": {"rows": folder, "max_rise": 0.1},
    }  # fmt: skip
    return IterateRecipe.model_validate(content | changes)


def entry(accuracy, loss, stopped=None):
    return {"accuracy": {"value": accuracy}, "gate_loss": loss, "stopped": stopped}


GAINING = [entry(0.1, 2.0), entry(0.3, 2.05), entry(0.5, 2.09)]
STOPPED = {"step": 3, "reason": "ifeval is 0.1", "rolled_back_to": None}


@pytest.mark.parametrize(
    ("last", "reason", "best"),
    [
        (entry(0.6, 2.0), "3 rounds", 3),
        (entry(0.505, 2.0), r"held-out accuracy changed by \+0.5%, no more than 1.0%", 3),
        (entry(0.2, 2.0), r"held-out accuracy changed by -30.0%", 2),
        (entry(0.9, 2.15), "the loss of the gate rose by 0.15, more than 0.1", 2),
        (entry(0.9, None), "the loss of the gate rose by nan", 2),
        (entry(0.9, 2.0, STOPPED), "the capability gate stopped round 3: ifeval is 0.1", 2),
        (entry(0.9, 2.0, STOPPED | {"rolled_back_to": 2}), "the capability gate stopped round 3", 3),
    ],
    ids=["all rounds", "too little", "worse", "gate", "not a number", "stopped", "rolled back"],
)
def test_rounds_end_for_a_reason_and_the_best_is_one_whose_gate_holds(tmp_path, last, reason, best):
    recipe = rounds_recipe(tmp_path)
    assert reason_to_stop(recipe, GAINING) is None
    assert re.match(reason, reason_to_stop(recipe, [*GAINING, last]))
    assert best_round(recipe, [*GAINING, last]) == best


def test_recipes_of_rounds_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sft or lora\.stack_on, and not both"):
        rounds_recipe(tmp_path, sft=tmp_path, lora={"stack_on": (tmp_path,)})
    with pytest.raises(ValueError, match=r"merge\.verify: false"):
        rounds_recipe(tmp_path, merge={"output": tmp_path, "verify": True})


def test_supervised_training_before_the_rounds_may_not_see_held_out_requests_or_another_model(files, tmp_path):
    rows = [*read_lines(files / "seeds.jsonl")[:3], read_lines(files / "heldout.jsonl")[0]]
    sft = {"model": "base", "output": "x", "data": {"train": str(write_pairs(tmp_path / "rows.jsonl", rows))}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft))
    path = write_rounds(tmp_path, files, sft="sft.yaml")
    with pytest.raises(DataError, match=r"rows\.jsonl line 4 holds the held-out request .* remove the row"):
        run(IterateRecipe.load(path), show=lambda text: None)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(sft | {"model": str(files)}))
    with pytest.raises(RecipeError, match="is to leave an adapter on"):
        run(IterateRecipe.load(path, [f"output={tmp_path / 'other'}"]), show=lambda text: None)


def test_a_typo_in_the_training_of_rounds_is_found_before_they_start(files, tmp_path):
    path = write_rounds(tmp_path, files, training={"max_stepz": 1})
    with pytest.raises(RecipeError, match=r"did you mean training\.max_steps"):
        run(IterateRecipe.load(path), show=lambda text: None)
    assert not (tmp_path / "run").exists()
