"""``moeft data check``: what it prints of files and of recipes."""

import json

import pytest
import yaml

from moeft.cli import main
from tests.tiny_training import sums, tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def code_of(*words):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", *map(str, words)])
    return stopped.value.code


def test_check_prints_formats_counts_and_rejects(tmp_path, capsys):
    calls = [{"role": "user", "content": "2+2?"},
             {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}]  # fmt: skip
    rows = [*sums(30), {"messages": calls, "tools": [{"name": "add"}]}, {"messages": []}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert code_of(path, "--rejects", tmp_path / "rejects.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: prompt_completion 30, messages 1"
    assert lines[1] == "  31 rows usable, 1 rejected (3.1%)"
    assert lines[2].startswith("  2.0 turns and ")
    assert lines[3] == "  1 with tools, 1 with calls"
    assert lines[4] == "  1 x no assistant turn with text, so there is nothing to train on (first: line 32)"
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["line"] == 32


def test_check_fails_where_training_would_stop(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [*sums(9), {"messages": []}])
    assert code_of(path) == 1
    assert "more than 5% of a file is rejected" in capsys.readouterr().err
    assert code_of(path, "--format", "openai") == 1
    assert "format is 'openai', expected one of" in capsys.readouterr().err
    assert code_of(tmp_path / "absent.jsonl") == 1
    assert code_of() == 2


def test_check_of_a_recipe_prints_the_composition_that_training_has(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    first, second = write(tmp_path / "a.jsonl", sums(24)), write(tmp_path / "b.jsonl", sums(6, offset=1))
    train = [{"path": str(first), "weight": 1}, {"path": str(second), "weight": 1, "train_on": "last"}]
    data = {"train": train, "eval": str(write(tmp_path / "c.jsonl", sums(3)))}
    recipe = {"model": "model", "output": "run", "data": data, "training": {"use_cpu": True}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert code_of("--recipe", tmp_path / "recipe.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'a.jsonl'}: prompt_completion 24; 24 rows kept, 0 rejected"
    table = [line.split() for line in lines[2:5]]
    assert [row[:5] for row in table[1:]] == [["a.jsonl", "prompt_completion", "0", "24", "6"],
                                              ["b.jsonl", "prompt_completion", "0", "6", "6"]]  # fmt: skip
    assert lines[5].startswith("held out: ")
    assert not (tmp_path / "run").exists()
