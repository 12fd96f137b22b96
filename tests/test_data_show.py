"""``moeft data show`` as a user runs it, and that the demo's rows stayed what they were."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import moeft.demo
from moeft.data.chat import encode
from moeft.data.rows import read_rows
from moeft.demo.ops_agent import generate
from tests.test_cli import moeft as run

BASE = Path(moeft.demo.__file__).parent / "base"
LONG = {"messages": [{"role": "user", "content": "word " * 99}, {"role": "assistant", "content": "no"}]}
SHORT = {"messages": [{"role": "user", "content": "[bold]Hi"}, {"role": "assistant", "content": "Hello 😀."}]}


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (LONG, SHORT, {"prompt": 3}, SHORT)), "utf-8")
    return file


def test_show_prints_trained_tokens_in_brackets_and_rejects_with_reasons(rows, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(BASE), "output": "run", "data": {"train": str(rows), "max_length": 64}}))
    done = run("data", "show", rows, "--recipe", recipe, "-n", 1)
    assert done.returncode == 0, done.stderr
    assert "<bos><|turn>user\n[bold]Hi<turn|>\n<|turn>model\n⟦Hello 😀.<turn|>⟧\n" in done.stdout
    assert "line 1 is rejected: " in done.stdout
    assert "max_length is 64" in done.stdout
    assert "line 3 is rejected: " in done.stdout
    assert "1 of 3 rows shown" in done.stdout


def test_show_takes_a_template_by_name_and_a_mode(rows):
    done = run("data", "show", rows, "--model", BASE, "--template", "chatml", "--train-on", "all")
    assert "chat template: chatml, shipped with moeft; the tokenizer spells <|im_start|>, <|im_end|>" in done.stdout
    assert "⟦<|im_start|>user\n[bold]Hi<|im_end|>\n<|im_start|>assistant\nHello 😀.<|im_end|>\n⟧" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "no tokenizer is named; give --model or --recipe"),
        (("--model", BASE, "--template", "gemma5"), "gemma5 is no file and no name of a chat template"),
        (("--model", BASE, "--train-on", "first"), "train_on is 'first', expected one of assistant, last"),
        (("--model", BASE.parent), "holds no tokenizer"),
    ],
)
def test_show_says_what_is_wrong(rows, arguments, reason):
    done = run("data", "show", rows, *arguments)
    assert done.returncode == 1
    assert reason in done.stderr


def test_rows_of_the_demo_keep_their_tokens_and_labels():
    train, _ = generate(0, 300, 20)
    digest = hashlib.sha256()
    for example in encode(read_rows(train), AutoTokenizer.from_pretrained(BASE), max_length=256).examples:
        digest.update(example["input_ids"].tobytes() + example["labels"].tobytes())
    # Of version 0.1, which found turns by prefixes and kept lists.
    assert digest.hexdigest() == "47c9ee31f1cee19056f85cd4ec1700aa0140b41b86c0125cd581b4ab09ec13ce"
