"""Dialogue as scenes of a visual novel: what characters say and what the reader may say next, as calls of tools."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moeft.data.rows import Message
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.tool_protocols.call import ToolCall, ToolProtocol
from moeft.tool_protocols.validity import problem_of_reply

MOST_CHOICES = 3
TOOLS: list[dict[str, Any]] = [
    {
        "name": "say",
        "description": "A character speaks.",
        "parameters": {
            "type": "object",
            "properties": {
                "speaker": {"type": "string", "minLength": 1, "maxLength": 40},
                "text": {"type": "string", "minLength": 1, "maxLength": 400},
            },
            "required": ["speaker", "text"],
        },
    },
    {
        "name": "choose",
        "description": "What the reader may say next.",
        "parameters": {
            "type": "object",
            "properties": {
                "choices": {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": 200},
                    "minItems": 2,
                    "maxItems": 4,
                }
            },
            "required": ["choices"],
        },
    },
]
"""The tools of a scene where a recipe gives no others."""
PROSE = ("text", "choices")
"""Their arguments that hold prose; the rest are names."""

# "ROMEO:" or "First Citizen:" before what is said; a name is one to four words, each with a capital.
_SPEAKER = re.compile(r"\s*([^\W\d_a-z][\w.'’-]*(?:[ ][^\W\d_a-z][\w.'’-]*){0,3}):\s+(?=\S)")
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


def split_speaker(text: str) -> tuple[str | None, str]:
    r"""Who speaks, if the text begins with a name and a colon, and what is said, on one line.

    Examples:
        >>> split_speaker("CATESBY:\nMy lord?")
        ('CATESBY', 'My lord?')
    """
    found = _SPEAKER.match(text)
    said = text[found.end() :] if found else text
    return (found[1] if found else None), " ".join(said.split())


def as_scene(
    messages: Sequence[Message], protocol: ToolProtocol, schemas: ToolSchemas, narrator: str = "Narrator"
) -> list[Message]:
    """Write the assistant's turns of a dialogue as calls.

    A turn becomes ``say``; where the next three turns of the user begin in two different ways at least, ``choose``
    offers their first sentences, in alphabetical order. A turn that has calls, in the protocol or as ``tool_calls``,
    keeps these.

    Args:
        messages: Turns of a row; the user's are put on one line.
        protocol: How calls are written.
        schemas: The tools; every reply is held to them.
        narrator: Who speaks where the text does not say.

    Raises:
        DataError: If there is no reply, or one says nothing, or is invalid in the protocol or against the tools.
    """
    written: list[Message] = []
    for place, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            content = _in_line(content)
        elif message["role"] == "assistant":
            content = _reply(message, _next_lines(messages[place + 1 :]), protocol, schemas, narrator)
            if problem := problem_of_reply(content, protocol, schemas):
                raise DataError(f"turn {place + 1}: {problem}")
        written.append({"role": message["role"], "content": content})
    if not any(message["role"] == "assistant" for message in written):
        raise DataError("no turn of the assistant")
    return written


def _reply(
    message: Message, following: Sequence[str], protocol: ToolProtocol, schemas: ToolSchemas, narrator: str
) -> str:
    text = message["content"].strip()
    if protocol.parse(text).calls:
        return text
    try:
        if structured := message.get("tool_calls"):
            made = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in structured]
            return protocol.reply(text, made)
        speaker, said = split_speaker(text)
        calls = [ToolCall("say", {"speaker": speaker or narrator, "text": said})]
        if len(following) > 1 and "choose" in schemas.names:
            calls.append(ToolCall("choose", {"choices": list(following)}))
        return protocol.format(calls)
    except ValueError as error:
        raise DataError(str(error)) from error


def _next_lines(messages: Sequence[Message]) -> list[str]:
    said = [split_speaker(message["content"])[1] for message in messages if message["role"] == "user"]
    first = [found.group() if (found := _SENTENCE.match(line)) else line for line in said]
    return sorted({line for line in first[:MOST_CHOICES] if line})


def _in_line(text: str) -> str:
    speaker, said = split_speaker(text)
    return f"{speaker}: {said}" if speaker else said
