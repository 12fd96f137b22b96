"""Modelfiles for Ollama: the same turns as the chat template, stop tokens, sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moeft.cli import main
from moeft.data.templates import TURN_MARKERS, shipped
from moeft.gguf.ollama import FORMATS, go_template, modelfile
from tests.test_gguf_export import BASE

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And five?"},
]


@pytest.mark.parametrize("name", TURN_MARKERS)
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[:2]])
def test_go_writes_the_turns_of_the_chat_template(name: str, messages: list[dict[str, Any]], tmp_path: Path) -> None:
    go = pytest.importorskip("go_template", reason="needs Go's templates: pip install py-go-template")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    expected = tokenizer.apply_chat_template(
        messages, chat_template=shipped(name), tokenize=False, add_generation_prompt=True
    )
    (tmp_path / "template").write_text(go_template(FORMATS[name]))
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [{key.capitalize(): text for key, text in message.items()} for message in messages]
    found = go.render(tmp_path / "template", {"Messages": turns, "System": system}).decode()
    # Ollama adds the token that begins a sequence itself.
    assert found == expected.removeprefix(tokenizer.bos_token)


def test_the_command_writes_a_modelfile_with_stops_sampling_and_context(tmp_path: Path) -> None:
    words = ["export", "gguf", str(BASE), str(tmp_path / "m.gguf"), "--type", "q8_0", "--ollama", "--context", "1024"]
    with pytest.raises(SystemExit, match="0"):
        main(words)
    text = (tmp_path / "m.Modelfile").read_text()
    assert text.startswith("FROM ./m.gguf\nPARAMETER num_ctx 1024\n")
    assert 'PARAMETER stop "<turn|>"\n' in text
    assert '"""{{ range' in text


def test_sampling_of_the_checkpoint_is_kept_and_nonsense_is_not(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((BASE / name).read_text())
    settings = {"temperature": 0.6, "top_k": 20, "top_p": True, "repetition_penalty": 1.1, "eos_token_id": [1, 99_999]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    text = modelfile(tmp_path, "m.gguf")
    assert [line for line in text.splitlines() if "PARAMETER" in line and "stop" not in line] == [
        "PARAMETER num_ctx 4096",
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.1",
    ]
    assert "# No chat format" in text
    with pytest.raises(ValueError, match="context is 0"):
        modelfile(tmp_path, "m.gguf", 0)


def test_a_template_that_is_told_by_its_marks_alone_is_said_to_be(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((BASE / name).read_text())
    (tmp_path / "chat_template.jinja").write_text(shipped("chatml"))
    assert "told by its marks" not in modelfile(tmp_path, "m.gguf")
    (tmp_path / "chat_template.jinja").write_text("You are helpful.\n" + shipped("chatml"))
    assert "# The format was told by its marks, chatml." in modelfile(tmp_path, "m.gguf")
