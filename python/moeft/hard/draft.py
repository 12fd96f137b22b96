"""A pair before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeft.data.rows import Message
from moeft.hard.requests import Request
from moeft.hard.workshop import Workshop
from moeft.tool_protocols import ToolCall


@dataclass(frozen=True)
class Draft:
    """Two answers to a conversation.

    Attributes:
        prompt: Up to the turn that is asked for.
        calls: What is right there.
        chosen: The right answer.
        rejected: The wrong one.
        how: How it was made, in words.
        tools: Schemas on offer, if not all.
    """

    prompt: list[Message]
    calls: tuple[ToolCall, ...]
    chosen: str
    rejected: str
    how: str
    tools: list[dict[str, Any]] | None = None


def with_wrong_calls(
    shop: Workshop, request: Request, calls: Sequence[ToolCall], how: str, prompt: list[Message] | None = None
) -> Draft:
    """A pair whose answers differ in their calls alone, and say the same beside them."""
    return Draft(
        prompt if prompt is not None else request.prompt,
        request.calls,
        shop.protocol.reply(request.said, request.calls),
        shop.protocol.reply(request.said, calls),
        how,
    )


def with_last_turn(prompt: list[Message], text: str) -> list[Message]:
    """A prompt whose last turn of the user reads otherwise."""
    last = max(index for index, message in enumerate(prompt) if message["role"] == "user")
    return [{**message, "content": text} if i == last else message for i, message in enumerate(prompt)]
