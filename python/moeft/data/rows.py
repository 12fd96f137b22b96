"""Chat rows from files and sequences, validated; every row that cannot be used is listed with its reason.

Accepted shapes of a row, all turned into ``{"messages": [{"role", "content"}, ...]}``:

* ``messages``: a list of ``{"role": "system" | "user" | "assistant", "content": str}``;
* ``conversations`` (ShareGPT): a list of ``{"from": "system" | "human" | "gpt" | ..., "value": str}``;
* ``prompt`` and ``completion``: each a string or a list of messages.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from moeft.errors import DataError

ROLES = ("system", "user", "assistant")

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
"""``from`` in ShareGPT files -> role."""


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates of transformers read."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    """What an assistant thought before it answered; not part of ``content``."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """``{"type": "function", "function": {"name": str, "arguments": object}}``; ``content`` may be empty then."""
    name: NotRequired[str]
    """Of a turn of role "tool": the tool that answered."""
    tool_call_id: NotRequired[str]
    """Of a turn of role "tool": the call that it answers."""
    train: NotRequired[bool]
    """Whether an assistant turn counts in the loss; absent, the mask mode decides."""


@dataclass(frozen=True)
class Row:
    """A conversation, or a plain text, and where it came from."""

    messages: list[Message]
    line: int
    """Line in the file, or position in the sequence; counted from 1."""
    tools: list[dict[str, Any]] | None = None
    """Schemas of the tools that the assistant may call, as OpenAI's ``tools``; for the chat template."""
    text: str | None = None
    """A document for continued pretraining, every token of which counts; ``messages`` is empty then."""


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    line: int
    """Line in the file, or position in the sequence; counted from 1."""
    reason: str
    source: str


@dataclass(frozen=True)
class Rows:
    """What was read: usable rows, and the rest with reasons."""

    rows: list[Row]
    rejects: list[Reject]
    source: str
    """Path of the file, or "rows" for rows given as objects."""

    def write_rejects(self, path: str | Path) -> None:
        """Write the rejects as JSON lines, ``{"source", "line", "reason"}``; the file is empty if there are none."""
        write_rejects(self.rejects, path)


def read_rows(data: str | Path | Iterable[Mapping[str, Any]]) -> Rows:
    """Read and validate chat rows.

    Args:
        data: Path of a JSON-lines file in UTF-8 (blank lines are skipped), or rows as mappings: a list, or a
            ``datasets.Dataset``.

    Raises:
        DataError: If there is no row, or none can be used; the message quotes the first reasons.
        FileNotFoundError: If the path does not exist.
    """
    source = str(data) if isinstance(data, str | Path) else "rows"
    numbered = _read_lines(Path(data)) if isinstance(data, str | Path) else enumerate(data, start=1)
    rows: list[Row] = []
    rejects: list[Reject] = []
    for line, raw in numbered:
        try:
            rows.append(Row(read_messages(_decoded(raw)), line))
        except DataError as error:
            rejects.append(Reject(line, str(error), source))
    if not rows:
        raise DataError(_nothing_left(source, rejects))
    return Rows(rows, rejects, source)


def write_rejects(rejects: Iterable[Reject], path: str | Path) -> None:
    """Write rejects as JSON lines, ``{"source", "line", "reason"}``."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for reject in rejects:
            record = {"source": reject.source, "line": reject.line, "reason": reject.reason}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_messages(row: Any) -> list[Message]:
    """Turn one row of any accepted shape into messages.

    Raises:
        DataError: If the shape, a type or a role is wrong, or no assistant turn has text.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {_kind(row)}, expected an object")
    if row.get("messages") is not None:
        messages = _turns(row["messages"], "messages", "role", "content", {role: role for role in ROLES})
    elif row.get("conversations") is not None:
        messages = _turns(row["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = _side(row["prompt"], "prompt", "user") + _side(row["completion"], "completion", "assistant")
    else:
        keys = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"keys are {keys}; expected messages, conversations, or prompt and completion")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError("no assistant turn with text, so there is nothing to train on")
    return messages


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Bytes are decoded line by line, so that one bad byte costs one row; splitlines() would also split at U+2028.
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield line, raw.rstrip(b"\r\n").decode("utf-8-sig" if line == 1 else "utf-8", errors="surrogateescape")


def _decoded(raw: Any) -> Any:
    if not isinstance(raw, str):
        return raw
    if any("\udc80" <= character <= "\udcff" for character in raw):
        raise DataError("not UTF-8; save the file as UTF-8")
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError("malformed JSON: nested too deeply") from error


def _side(value: Any, key: str, role: str) -> list[Message]:
    """One side of a prompt/completion row, which is a text or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, key, "role", "content", {role: role for role in ROLES})


def _turns(turns: Any, key: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"{key} is {_kind(turns)}, expected a list")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"{key}[{index}] is {_kind(turn)}, expected an object")
        role, content = turn.get(role_key), turn.get(content_key)
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"{key}[{index}].{role_key} is {role!r}, expected one of {', '.join(roles)}")
        if not isinstance(content, str):
            raise DataError(f"{key}[{index}].{content_key} is {_kind(content)}, expected a string")
        messages.append({"role": roles[role], "content": content})
    return messages


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _nothing_left(source: str, rejects: list[Reject]) -> str:
    if not rejects:
        return f"{source} has no rows"
    first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
    return f"{source}: none of {len(rejects)} rows can be used. First reasons: {first}"
