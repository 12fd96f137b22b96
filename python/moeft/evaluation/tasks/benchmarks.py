"""HellaSwag, PIQA, ARC and MMLU: rows to questions, with lm-eval's prompts.

Rows have the columns of the hub's data sets, or those of common JSON-lines copies, whose text is used as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from moeft.errors import DataError
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Item, Task
from moeft.evaluation.tasks.choice import choice_item, choice_task

Question = tuple[str, Sequence[str], int] | tuple[str, Sequence[str], int, str]
"""Context, choices, index of the right one, and perhaps the heading above examples."""


def hellaswag(rows: Sequence[Record]) -> Task:
    """Which ending follows; ``ctx``, ``endings``, ``gold``, or the hub's columns, whose brackets are removed."""
    return choice_task("hellaswag", _items("hellaswag", rows, _hellaswag))


def piqa(rows: Sequence[Record]) -> Task:
    """Which of two solutions works; ``query``, ``choices``, ``gold``, or ``goal``, ``sol1``, ``sol2``, ``label``."""
    return choice_task("piqa", _items("piqa", rows, _piqa))


def arc_easy(rows: Sequence[Record]) -> Task:
    """Grade-school science, the easier part; see :func:`arc_challenge` for the columns."""
    return choice_task("arc_easy", _items("arc_easy", rows, _arc))


def arc_challenge(rows: Sequence[Record]) -> Task:
    """Grade-school science; ``question``, ``choices``, ``answerKey``, or ``query``, ``choices``, ``gold``."""
    return choice_task("arc_challenge", _items("arc_challenge", rows, _arc))


def mmlu(rows: Sequence[Record]) -> Task:
    """Which letter; ``question``, four ``choices``, ``answer``. A line about the ``subject`` stands above examples."""
    return choice_task("mmlu", _items("mmlu", rows, _mmlu), normalised=False)


def _items(task: str, rows: Sequence[Record], question: Callable[[dict[str, Any]], Question]) -> list[Item]:
    items = []
    for line, row in rows:
        try:
            items.append(choice_item(line, *question(row)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"task {task}: row {line} has the columns {', '.join(map(str, row))} and cannot be read as a question "
                f"({type(error).__name__}: {error}); docs/evaluation.md lists the columns of each task"
            ) from error
    return items


def _hellaswag(row: dict[str, Any]) -> Question:
    if "gold" in row:
        return row["ctx"], row["endings"], int(row["gold"])
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _without_brackets(context), [_without_brackets(ending) for ending in row["endings"]], int(row["label"])


def _without_brackets(text: str) -> str:
    """Without the headings that the WikiHow part of HellaSwag has in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: dict[str, Any]) -> Question:
    if "gold" in row:
        return f"{row['query']}\nAnswer:", row["choices"], int(row["gold"])
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])


def _arc(row: dict[str, Any]) -> Question:
    if "gold" in row:
        return f"{row['query']}\nAnswer:", row["choices"], int(row["gold"])
    question, choices = row["question"], row.get("choices", ())
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    return f"Question: {question}\nAnswer:", texts, labels.index(row["answerKey"])


def _mmlu(row: dict[str, Any]) -> Question:
    lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    subject = str(row.get("subject", "")).replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    return "\n".join([row["question"].strip(), *lettered, "Answer:"]), list("ABCD"), int(row["answer"]), heading
