"""Asks a served model the few things that show whether template, stop tokens and parsers fit it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeft.errors import ServingError
from moeft.serving.client import Client

MARKERS = (
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
    *("<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Answer:
    """What one question showed: its name, whether all is well (None if it showed nothing), and what came."""

    name: str
    passed: bool | None
    said: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'FAILED', None: 'open'}[self.passed]:<7}{self.name:<12}{self.said}"


@dataclass(frozen=True)
class SmokeTest:
    """Answers in the order of the questions. ``str()`` is a table."""

    answers: tuple[Answer, ...]

    @property
    def passed(self) -> bool:
        """Whether no question failed."""
        return all(answer.passed is not False for answer in self.answers)

    def __str__(self) -> str:
        return "\n".join(map(str, self.answers))


def smoke_test(client: Client, max_tokens: int = 128) -> SmokeTest:
    """Ask for a raw completion, a chat reply and a tool call.

    Args:
        client: Of the served model.
        max_tokens: Most tokens of a reply.

    Returns:
        ``completion``: the model goes on with a text. ``chat``: the reply holds text and none of the marks of turns,
        thoughts and calls. ``stop``: it ended by itself; open if it was too long to tell. ``tool call``: a call that
        was asked for came as name and JSON arguments; open if the model wrote none. An error of the server is an answer
        that failed.
    """
    reply: dict[str, Any] = {}

    def completion() -> tuple[bool | None, str]:
        found = client.complete("The", n_predict=min(8, max_tokens), temperature=0)
        return bool(found["content"]) or None, _short(found["content"])

    def chat() -> tuple[bool | None, str]:
        reply.update(client.chat(QUESTION, max_tokens=max_tokens, temperature=0))
        message = reply["message"]
        content, thought = message.get("content") or "", message.get("reasoning_content")
        said = _short(content) + (f", thought {_short(thought)}" if thought else "")
        leaked = _leaked(content + (thought or ""))
        if leaked:
            return False, f"{leaked} in {said}"
        if thought and not content.strip() and reply["finish_reason"] == "stop":
            return False, f"the whole reply is a thought, so llama.cpp cannot parse this chat template: {said}"
        return bool(content.strip()) or None, said

    def stop() -> tuple[bool | None, str]:
        reason = reply.get("finish_reason")
        return {None: None, "length": None}.get(reason, True), f"finish_reason {reason}"

    def tool_call() -> tuple[bool | None, str]:
        options = {"tools": [TOOL], "tool_choice": "required"}
        found = client.chat(QUESTION, max_tokens=max_tokens, temperature=0, **options)
        if found["finish_reason"] == "length":
            return None, f"no end within {max_tokens} tokens"
        calls = found["message"].get("tool_calls") or []
        if not calls:
            content = found["message"].get("content") or ""
            return (False if _leaked(content) else None), f"no call in {_short(content)}"
        function = calls[0]["function"]
        arguments = json.loads(function["arguments"])
        return function["name"] == "weather" and "city" in arguments, f"{function['name']}({function['arguments']})"

    questions = (("completion", completion), ("chat", chat), ("stop", stop), ("tool call", tool_call))
    return SmokeTest(tuple(_asked(name, question) for name, question in questions))


def _asked(name: str, question: Callable[[], tuple[bool | None, str]]) -> Answer:
    try:
        return Answer(name, *question())
    except (ServingError, ValueError, KeyError) as error:
        return Answer(name, False, str(error))


def _leaked(text: str) -> str:
    return " ".join(marker for marker in MARKERS if marker in text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
