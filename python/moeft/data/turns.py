"""The order of turns that a conversation must have to be trained on.

* ``strict``: only the first turn may be of the system; then user and assistant take turns, with calls and answers of
  tools between, each with text, and the assistant has the last word. Anything else is refused;
* ``trim``: as strict, after assistant turns at the front and unanswered turns at the end are cut off;
* ``any``: all that has an assistant turn; the chat template has to cope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from moeft.config.sources import Turns
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message

_MAY_FOLLOW = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool", "user"),
    "tool": ("tool", "assistant"),
}


def check_turns(turns: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: If it is none of these.
    """
    if turns not in get_args(Turns):
        raise ValueError(f"turns is {turns!r}, expected one of {', '.join(get_args(Turns))}")


def arrange(messages: list[Message], turns: Turns) -> list[Message]:
    """Check the order of turns, after trimming if that was asked for.

    Raises:
        DataError: If the order is not accepted, or no assistant turn has something to train on.
    """
    if turns == "trim":
        messages = _trimmed(messages)
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise DataError("no assistant turn with text, so there is nothing to train on")
    if turns != "any":
        _check_order(messages)
    return messages


def _trimmed(messages: list[Message]) -> list[Message]:
    start = int(bool(messages) and messages[0]["role"] == "system")
    first, last = start, len(messages)
    while first < last and messages[first]["role"] in ("assistant", "tool"):
        first += 1
    while last > first and messages[last - 1]["role"] != "assistant":
        last -= 1
    return messages[:start] + messages[first:last]


def _check_order(messages: list[Message]) -> None:
    before = "system"
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and index == 0:
            continue
        if role not in _MAY_FOLLOW[before]:
            raise DataError(_out_of_order(before, role, index))
        if role in ("user", "assistant") and not _says_something(message):
            raise DataError(f"turn {index + 1} ({role}) is empty")
        before = "calls" if message.get("tool_calls") else role
    if before not in ("assistant", "calls"):
        raise DataError(f"the last turn is of role {before}, which nothing answers; data.turns: trim cuts it off")


def _out_of_order(before: str, role: str, index: int) -> str:
    if index == 0 or (before == "system" and index == 1):
        return f"the conversation starts with a turn of role {role}, expected user; data.turns: trim cuts it off"
    if role == "system":
        return f"turn {index + 1} is of role system, expected only as the first turn"
    return f"turn {index + 1} is of role {role} after {before}, expected {' or '.join(_MAY_FOLLOW[before])}"


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))
