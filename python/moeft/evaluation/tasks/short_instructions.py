"""Instructions of IFEval that the beginning of a reply shows to be followed or not, checked without other packages.

Source:
    Instruction-Following Evaluation for Large Language Models, https://arxiv.org/abs/2311.07911, table 4, strict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeft.errors import DataError
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Figures, Item, Metric, Task
from moeft.evaluation.tasks.replies import chat_item, reply_task

MAX_NEW_TOKENS = 96
METRICS = (Metric("prompt_strict"), Metric("instruction_strict"))
CHECKS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "punctuation:no_comma": lambda reply, _: "," not in reply,
    # The language of the reply, which IFEval asks for too, is not told from so few words.
    "change_case:english_lowercase": lambda reply, _: reply.islower(),
    "change_case:english_capital": lambda reply, _: reply.isupper(),
    "detectable_format:title": lambda reply, _: re.search(r"<<[^\n]*[^\s<>][^\n]*>>", reply) is not None,
    "keywords:existence": lambda reply, given: all(_finds(word, reply) for word in given["keywords"]),
    "keywords:forbidden_words": lambda reply, given: (
        not any(_finds(rf"\b{word}\b", reply) for word in given["forbidden_words"])
    ),
}
"""Instruction -> whether a reply follows it, given its arguments."""


def ifeval_short(rows: Sequence[Record]) -> Task:
    """Rows with ``prompt``, ``instruction_id_list`` and ``kwargs``, as in IFEval; replies of up to 96 tokens.

    Raises:
        DataError: If a row lacks a column or has an instruction that is not in :data:`CHECKS`.
    """
    items: list[Item] = []
    for line, row in rows:
        names, given = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given) or not names:
            raise DataError(f"task ifeval_short: row {line} needs `instruction_id_list` and as many `kwargs`")
        if unknown := [name for name in names if name not in CHECKS]:
            raise DataError(
                f"task ifeval_short: row {line} has the instruction {unknown[0]!r}, expected {', '.join(CHECKS)}; "
                "task ifeval knows them all"
            )
        items.append(chat_item("ifeval_short", line, row, MAX_NEW_TOKENS, list(zip(names, given, strict=True))))
    return reply_task("ifeval_short", items, METRICS, _judge)


def _judge(item: Item, reply: str) -> Figures:
    # An empty reply follows nothing, although there is no comma in it.
    followed = [bool(reply.strip()) and CHECKS[name](reply, given) for name, given in item.reference]
    return {
        "prompt_strict": (float(all(followed)), 1.0),
        "instruction_strict": (float(sum(followed)), float(len(followed))),
    }


def _finds(pattern: str, reply: str) -> bool:
    return re.search(pattern, reply, re.IGNORECASE) is not None
