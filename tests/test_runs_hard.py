"""``moeft hard`` from files to files: pairs, an analysis with its picture, and one whole round of the loop."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from moeft.cli import main
from moeft.config.iterate import IterateRecipe
from moeft.data.preferences import read_preferences
from moeft.demo.ops_agent import generate, write_jsonl
from moeft.demo.ops_schema import ops_tools
from moeft.provenance.files import read_lines
from moeft.runs.iterate import reason_to_stop, run
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


def test_a_round_of_the_loop_probes_builds_tunes_and_measures(files, tmp_path):
    base = save_tiny_model("qwen3_moe", tmp_path / "base", torch.bfloat16)
    tiny_tokenizer().save_pretrained(base)
    gate = write_pairs(tmp_path / "gate.jsonl", sums(4))
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
        "gate": {"rows": str(gate), "max_rise": 5.0},
        "rounds": 2,
    }  # fmt: skip
    path = tmp_path / "iterate.yaml"
    path.write_text(yaml.safe_dump(recipe))
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


def test_rounds_go_on_while_they_gain_and_end_when_the_gate_breaks(files, tmp_path):
    def entry(accuracy, loss):
        return {"accuracy": {"value": accuracy}, "gate_loss": loss}

    recipe = IterateRecipe.model_validate(
        {
            "model": tmp_path, "output": tmp_path, "rounds": 3, "min_gain": 0.01,
            "data": {"tools": tmp_path, "seeds": tmp_path, "heldout": tmp_path},
            "gate": {"rows": tmp_path, "max_rise": 0.1},
        }
    )  # fmt: skip
    gaining = [entry(0.1, 2.0), entry(0.3, 2.05), entry(0.5, 2.09)]
    assert reason_to_stop(recipe, gaining) is None
    assert "3 rounds" in reason_to_stop(recipe, [*gaining, entry(0.6, 2.0)])
    assert "changed by +0.5%" in reason_to_stop(recipe, [*gaining, entry(0.505, 2.0)])
    assert "the loss of the gate rose by 0.15" in reason_to_stop(recipe, [*gaining, entry(0.9, 2.15)])
