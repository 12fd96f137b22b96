"""Text with the turn markers of a chat template, back into turns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from moeft.data.formats.message_list import OPENAI_ROLES
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message


class Markers(NamedTuple):
    """How a template begins and ends a turn; the role follows the first, up to the end of its line."""

    start: str
    end: str


STYLES = {
    "Gemma": Markers("<start_of_turn>", "<end_of_turn>"),
    "Gemma 4": Markers("<|turn>", "<turn|>"),
    "ChatML": Markers("<|im_start|>", "<|im_end|>"),
}

_BEGIN_OF_TEXT = ("<bos>", "<s>", "<|begin_of_text|>")
_THOUGHT = re.compile(r"<\|channel>thought\n(.*?)<channel\|>", re.DOTALL)
_GEMMA4_TOOLS = ("<|tool>", "<|tool_call>", "<|tool_response>")


def marked_turns(text: str) -> list[Message] | None:
    """Turns of a marked text, or None if it does not begin with a marker.

    Templates trim contents, so white space around them is left out. Gemma 4's thoughts become ``reasoning_content``.
    The last turn need not be closed.

    Raises:
        DataError: If a role is unknown, text stands outside of turns, or a turn holds Gemma 4's notation for tools.
    """
    body = text.lstrip()
    for begin in _BEGIN_OF_TEXT:
        body = body.removeprefix(begin).lstrip()
    style = next((style for style in STYLES.values() if body.startswith(style.start)), None)
    if style is None:
        return None
    messages: list[Message] = []
    for index, piece in enumerate(body.split(style.start)[1:], start=1):
        turn, closed, after = piece.partition(style.end)
        name, line_end, content = turn.partition("\n")
        role = OPENAI_ROLES.get(name.strip())
        if role is None:
            raise DataError(f"turn {index} is of role {name.strip()!r}, expected one of {', '.join(OPENAI_ROLES)}")
        if after.strip() and not after.strip().startswith("<eos>"):
            raise DataError(f"text stands between turn {index} and the next: {after.strip()[:40]!r}")
        if not closed and not line_end:
            break  # A header at the end, as a generation prompt leaves it.
        messages.append(_message(role, content, index))
    return messages


def _message(role: str, content: str, index: int) -> Message:
    if any(marker in content for marker in _GEMMA4_TOOLS):
        raise DataError(f"turn {index} holds calls of tools as Gemma 4 writes them; give them as messages and tools")
    thoughts = _THOUGHT.findall(content) if role == "assistant" else []
    message: Message = {"role": role, "content": _THOUGHT.sub("", content).strip() if thoughts else content.strip()}
    if thoughts:
        message["reasoning_content"] = "\n".join(thought.strip() for thought in thoughts)
    return message
