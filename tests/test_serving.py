"""llama.cpp's server as a process, asked over loopback, with models whose replies are known."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moeft import gguf
from moeft.cli import main
from moeft.data.templates import shipped
from moeft.errors import ServingError
from moeft.serving import Client, ServeOptions, Server, smoke_test
from moeft.serving.smoke import QUESTION, TOOL
from tests.scripted_models import save_scripted_model

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

START = "<|turn>model\n"
SPEECH = ("Good evening!", " Tea?")
THOUGHT = ("<|channel>", "thought\nIt is late, so", " I greet.", "<channel|>", *SPEECH)
CALL = ("<|tool_call>", 'call:weather{city:<|"|>', "Paris", '<|"|>}', "<tool_call|>", "<|tool_response>")


def serve(folder: Path, *words: str) -> Server:
    """A server of a model with Gemma 4's template that says these tokens whenever it is asked."""
    rest = [word for word in ("<|turn>", "<|tool>", "<tool|>", *THOUGHT, *CALL) if word[0] == "<" and word not in words]
    model = save_scripted_model(
        folder / "model", [[START, *words]], end="<turn|>", template=shipped("gemma4"), special=rest
    )
    gguf.export(model, folder / "model.gguf", type="f16")
    return Server(folder / "model.gguf", ServeOptions(context=512, threads=1, name="scripted"))


def test_a_reply_is_cut_at_the_stop_token_and_its_thought_stands_apart(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    with (
        serve(tmp_path, *THOUGHT) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as client,
    ):
        assert [model.id for model in client.models.list()] == ["scripted"]
        choice = client.chat.completions.create(model="scripted", messages=QUESTION, max_tokens=50).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("stop", "".join(SPEECH))
        assert choice.message.reasoning_content == "It is late, so I greet."
        raw = client.completions.create(model="scripted", prompt=START, max_tokens=50, temperature=0).choices[0]
        assert (raw.finish_reason, raw.text.endswith("".join(SPEECH))) == ("stop", True)
        cut = client.chat.completions.create(model="scripted", messages=QUESTION, max_tokens=50, stop=[" Tea"])
        assert cut.choices[0].message.content == SPEECH[0]
        assert "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(model="scripted", messages=QUESTION, max_tokens=50, stream=True)
            if chunk.choices
        ) == "".join(SPEECH)


def test_a_tool_call_arrives_parsed(tmp_path: Path) -> None:
    with serve(tmp_path, *CALL) as server:
        choice = server.client.chat(QUESTION, tools=[TOOL], max_tokens=50)
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Paris"})
        found = {answer.name: answer.passed for answer in smoke_test(server.client).answers}
        # Without tools in the request, the marks of a call are text that nobody parses.
        assert found == {"completion": None, "chat": False, "stop": True, "tool call": True}


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen3", "chatml"])
def test_the_reply_of_a_shipped_template_is_content(name: str, tmp_path: Path) -> None:
    starts = {
        "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
        "llama3": ("<|end_header_id|>\n\n", "<|eot_id|>"),
        "qwen3": ("<|im_start|>assistant\n", "<|im_end|>"),
        "chatml": ("<|im_start|>assistant\n", "<|im_end|>"),
    }
    start, end = starts[name]
    model = save_scripted_model(tmp_path / "model", [[start, *SPEECH]], end=end, template=shipped(name))
    gguf.export(model, tmp_path / "model.gguf", type="f16")
    with Server(tmp_path / "model.gguf", ServeOptions(context=512, threads=1)) as server:
        reply = server.client.chat(QUESTION, max_tokens=50, temperature=0)
    assert (reply["message"]["content"], reply["finish_reason"]) == ("".join(SPEECH), "stop")


def test_a_template_that_llama_cpp_cannot_parse_fails_the_smoke_test(tmp_path: Path) -> None:
    unknown = shipped("gemma4").replace("'<|tool_call>call:'", '"<|tool_call>call:"')
    model = save_scripted_model(
        tmp_path / "model", [[START, *SPEECH]], end="<turn|>", template=unknown, special=["<|turn>"]
    )
    gguf.export(model, tmp_path / "model.gguf", type="f16")
    with Server(tmp_path / "model.gguf", ServeOptions(context=512, threads=1)) as server:
        found = smoke_test(server.client, max_tokens=40)
    assert not found.passed
    assert "whole reply is a thought" in str(found)


def test_a_damaged_file_is_an_error_that_says_what_llama_cpp_said(tmp_path: Path) -> None:
    model = save_scripted_model(tmp_path / "model", [["a b", "c d"]], end="<end>", template="{{ messages }}")
    gguf.export(model, tmp_path / "whole.gguf", type="f16")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:60_000])
    with pytest.raises(ServingError, match=r"did not load .*cut\.gguf[^$]*it said"), Server(tmp_path / "cut.gguf"):
        pass
    with pytest.raises(ServingError, match="within 0 seconds"), Server(tmp_path / "whole.gguf", start_seconds=0.01):
        pass
    with pytest.raises(FileNotFoundError, match="moeft export gguf"):
        Server(tmp_path / "absent.gguf")
    with pytest.raises(ServingError, match="does not answer"):
        Client("http://127.0.0.1:9").get("/health")
    with pytest.raises(ValueError, match="context is -1"):
        ServeOptions(context=-1)


def test_a_server_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    serve(tmp_path, *SPEECH)
    code = "import sys; from moeft.cli import main; main(['serve', sys.argv[1], '--port', '0', '--threads', '1'])"
    words = [sys.executable, "-c", code, str(tmp_path / "model.gguf")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        line = started.stdout.readline()
        with Client(line.split(" is served at ")[1].split("/v1")[0]) as client:
            assert client.is_healthy()
            os.kill(started.pid, signal.SIGKILL)
            started.wait()
            deadline = time.monotonic() + 20
            while client.is_healthy():
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_the_command_asks_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve(tmp_path, *CALL)
    words: list[Any] = ["serve", str(tmp_path / "model.gguf"), "--port", "0", "--threads", "1", "--smoke-test"]
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert 'weather({"city":"Paris"})' in capsys.readouterr().out


LLAMA_SERVER = """#!{python}
# Takes the flags of llama.cpp's own program, and no others, and serves with the llama.cpp of xllamacpp.
import argparse, signal, sys, threading, xllamacpp
words = argparse.ArgumentParser(allow_abbrev=False)
for name in ("model", "host", "port", "ctx-size", "parallel", "n-gpu-layers", "reasoning-format", "threads"):
    words.add_argument("--" + name, required=True)
words.add_argument("--threads-batch")
words.add_argument("--alias")
for name in ("jinja", "no-warmup"):
    words.add_argument("--" + name, action="store_true", required=True)
given = words.parse_args()
found = xllamacpp.CommonParams()
found.model.path, found.hostnames, found.port = given.model, [given.host], int(given.port)
found.n_ctx, found.n_parallel, found.warmup, found.use_jinja = int(given.ctx_size), int(given.parallel), False, True
server, ended = xllamacpp.Server(found), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
ended.wait()
"""


def test_a_llama_server_is_started_with_its_flags_and_ends_with_the_context(tmp_path: Path) -> None:
    serve(tmp_path, *SPEECH)
    program = tmp_path / "llama-server"
    program.write_text(LLAMA_SERVER.format(python=sys.executable))
    program.chmod(0o755)
    options = ServeOptions(context=256, threads=1, parallel=2)
    with Server(tmp_path / "model.gguf", options, program=program) as server:
        address = server.address
        reply = server.client.chat(QUESTION, max_tokens=20, temperature=0)
        assert reply["message"]["content"] == "".join(SPEECH)
    with Client(address) as client:
        assert not client.is_healthy()
    program.write_text(f"#!{sys.executable}\nimport sys; sys.exit('no such flag')\n")
    with pytest.raises(ServingError, match=r"(?s)did not load .*exit status 1.*no such flag"):
        Server(tmp_path / "model.gguf", options, program=program).__enter__()
