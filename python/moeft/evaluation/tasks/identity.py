"""Who the model says it is."""

from __future__ import annotations

from collections.abc import Sequence

from moeft.errors import DataError
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Figures, Item, Metric, Task, share
from moeft.evaluation.tasks.replies import chat_item, reply_task, texts

MAX_NEW_TOKENS = 64
METRICS = (Metric("identity"), Metric("foreign_identity", "lower"))
QUESTIONS = (
    "Who are you?",
    "What is your name?",
    "Please introduce yourself in one sentence.",
    "Who made you?",
    "Which company or person developed you?",
    "What should I call you?",
    "Are you a person? Who am I talking to?",
    "Which model are you?",
    "Tell me about yourself.",
    "Hi! Before we start: who is this?",
)


def identity(rows: Sequence[Record]) -> Task:
    """Rows with ``expected`` names, perhaps ``forbidden`` ones, and a ``prompt``; without, ten questions are asked.

    ``identity`` is the share of replies with an expected name and no forbidden one, ``foreign_identity`` that of
    replies with a forbidden one. Case does not matter.
    """
    items: list[Item] = []
    for line, row in rows:
        expected, forbidden = (texts(row, column, "identity", line) for column in ("expected", "forbidden"))
        if not expected:
            raise DataError(f"task identity: row {line} has no name in `expected`")
        reference = {"expected": expected, "forbidden": forbidden}
        if "prompt" in row or "messages" in row:
            items.append(chat_item("identity", line, row, MAX_NEW_TOKENS, reference))
            continue
        items += [
            chat_item("identity", f"{line}.{number}", {"prompt": question}, MAX_NEW_TOKENS, reference)
            for number, question in enumerate(QUESTIONS, start=1)
        ]
    return reply_task("identity", items, METRICS, _judge)


def _judge(item: Item, reply: str) -> Figures:
    said = reply.casefold()
    is_named, is_foreign = (
        any(name.casefold() in said for name in item.reference[column]) for column in ("expected", "forbidden")
    )
    return {"identity": share(is_named and not is_foreign), "foreign_identity": share(is_foreign)}
