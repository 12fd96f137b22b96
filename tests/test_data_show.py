"""``moeft data show`` as a user runs it, and that the demo's rows stayed what they were."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import moeft.demo
from moeft.cli import main
from moeft.data.chat import encode
from moeft.data.reading import read_rows
from moeft.demo.ops_agent import generate

BASE = Path(moeft.demo.__file__).parent / "base"
LONG = {"messages": [{"role": "user", "content": "word " * 99}, {"role": "assistant", "content": "no"}]}
SHORT = {"messages": [{"role": "user", "content": "[bold]Hi"}, {"role": "assistant", "content": "Hello 😀."}]}


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (LONG, SHORT, {"prompt": 3}, SHORT)), "utf-8")
    return file


def test_show_prints_trained_tokens_in_brackets_and_rejects_with_reasons(run, rows, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(BASE), "output": "run", "data": {"train": str(rows), "max_length": 64}}))
    code, shown, _ = run("data", "show", rows, "--recipe", recipe, "-n", 1)
    assert code == 0
    assert "<bos><|turn>user\n[bold]Hi<turn|>\n<|turn>model\n⟦Hello 😀.<turn|>⟧\n" in shown
    assert "line 1 is rejected: " in shown
    assert "max_length is 64" in shown
    assert "line 3 is rejected: " in shown
    assert "1 of 3 rows shown" in shown


def test_show_reads_rows_in_the_order_of_turns_that_the_recipe_accepts(run, tmp_path):
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text(json.dumps({"messages": [*SHORT["messages"], {"role": "user", "content": "Bye"}]}), "utf-8")
    data = {"train": str(rows), "turns": "trim"}
    recipe.write_text(json.dumps({"model": str(BASE), "output": "run", "data": data}))
    assert run("data", "show", rows, "--model", BASE)[0] == 1
    assert "⟦Hello 😀.<turn|>⟧\n" in run("data", "show", rows, "--recipe", recipe)[1]


def test_show_takes_a_template_by_name_and_a_mode(run, rows):
    _, shown, _ = run("data", "show", rows, "--model", BASE, "--chat-template", "chatml", "--train-on", "all")
    assert "chat template: chatml, shipped with moeft; the tokenizer spells <|im_start|>, <|im_end|>" in shown
    assert "⟦<|im_start|>user\n[bold]Hi<|im_end|>\n<|im_start|>assistant\nHello 😀.<|im_end|>\n⟧" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", BASE, "--chat-template", "gemma5"), "gemma5 is no file and no name of a chat template"),
        (("--model", BASE, "--train-on", "first"), "train_on is 'first', expected one of assistant, last"),
        (("--model", BASE.parent), "holds no tokenizer"),
    ],
)
def test_show_says_what_is_wrong(run, rows, arguments, reason):
    code, _, message = run("data", "show", rows, *arguments)
    assert code == 1
    assert reason in message


def test_show_without_a_tokenizer_is_wrong_usage(run, rows):
    code, _, message = run("data", "show", rows)
    assert code == 2
    assert "give --model or --recipe" in message


def test_rows_of_the_demo_keep_their_tokens_and_labels():
    train, _ = generate(0, 300, 20)
    digest = hashlib.sha256()
    for example in encode(read_rows(train), AutoTokenizer.from_pretrained(BASE), max_length=256).examples:
        digest.update(example["input_ids"].tobytes() + example["labels"].tobytes())
    # Of version 0.1, which found turns by prefixes and kept lists.
    assert digest.hexdigest() == "47c9ee31f1cee19056f85cd4ec1700aa0140b41b86c0125cd581b4ab09ec13ce"
