"""What tasks over replies share: the prompts of their rows, and a task that judges each reply by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeft.errors import DataError
from moeft.evaluation.request import Answer, Chat
from moeft.evaluation.task import Figures, Item, Metric, Task


def chat_item(task: str, key: str, row: Mapping[str, Any], max_new_tokens: int, reference: Any = None) -> Item:
    """An item that asks a row's ``prompt``, or its ``messages`` up to the user's last one.

    Raises:
        DataError: If the row has neither.
    """
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return Item(key, Chat(({"role": "user", "content": row["prompt"]},), max_new_tokens), reference)
    messages = row.get("messages")
    if isinstance(messages, list):
        asked = [i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"]
        if asked:
            return Item(key, Chat(tuple(messages[: asked[-1] + 1]), max_new_tokens), reference)
    raise DataError(f"task {task}: row {key} has no `prompt` and no `messages` with a user's turn")


def reply_task(
    name: str, rows: Sequence[Item], metrics: Sequence[Metric], judge: Callable[[Item, str], Figures]
) -> Task:
    """A task whose figures come from each reply alone."""

    def grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
        return [judge(item, answer["reply"]) for item, answer in answered]

    return Task(name, tuple(rows), tuple(metrics), grade)


def texts(row: Mapping[str, Any], column: str, task: str, key: str) -> list[str]:
    """A column that holds a text or several.

    Raises:
        DataError: If it holds anything else.
    """
    value = row.get(column, [])
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(f"task {task}: row {key} has {value!r} in `{column}`, expected a text or a list of texts")
    return found
