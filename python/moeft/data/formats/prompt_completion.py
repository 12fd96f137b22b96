"""``prompt`` and ``completion``, each a text or a list of messages: only the completion is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import Format, Parsed
from moeft.data.formats.message_list import read_turns
from moeft.data.formats.sharegpt import with_system
from moeft.data.formats.tool_calls import read_tools

if TYPE_CHECKING:
    from moeft.data.rows import Message


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read both sides; assistant turns of the prompt get ``train: false`` if they do not say otherwise.

    Raises:
        DataError: If a side is neither text nor a list of messages.
    """
    prompt = side(record.get("prompt"), "prompt", "user")
    for message in prompt:
        if message["role"] == "assistant":
            message.setdefault("train", False)
    messages = prompt + side(record.get("completion"), "completion", "assistant")
    return Parsed(with_system(record.get("system"), messages), read_tools(record.get("tools")))


def side(value: Any, key: str, role: str) -> list[Message]:
    """One side of a row: a text of this role, or a list of messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else read_turns(value, key)


FORMAT = Format("prompt_completion", (("prompt", "completion"),), parse)
