"""How a model writes: length, variety, repetition, and phrases of machine prose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moeft.data.files import open_records
from moeft.errors import DataError
from moeft.evaluation.request import Answer
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Item, Metric, Task
from moeft.evaluation.tasks.replies import chat_item
from moeft.evaluation.text_metrics import (
    PhraseList,
    moving_average_ratio,
    repeated_trigrams,
    shared_trigrams,
    type_token_ratio,
    words,
)

MAX_NEW_TOKENS = 512
METRICS = (
    Metric("words", None),
    Metric("ttr", None),
    Metric("mattr"),
    Metric("rep3g", "lower"),
    Metric("cross_document_trigrams", "lower"),
    Metric("slop_per_1k_words", "lower"),
)


def style(rows: Sequence[Record], phrases: Sequence[Path]) -> Task:
    """Rows with a ``prompt``, or ``messages``; replies are counted, see docs/evaluation.md for each metric.

    Args:
        rows: The prompts.
        phrases: Lists of phrases, one a line, or JSON lines with a ``phrase``; without any, slop is not counted.
    """
    items = [chat_item("style", line, row, MAX_NEW_TOKENS) for line, row in rows]
    listed = PhraseList.of(line for path in phrases for line in _phrases(path))
    metrics = METRICS if phrases else METRICS[:-1]

    def grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
        found = [words(answer["reply"]) for _, answer in answered]
        return [
            _figures(of_text, *shared, listed) for of_text, shared in zip(found, shared_trigrams(found), strict=True)
        ]

    return Task("style", tuple(items), metrics, grade)


def _figures(found: list[str], shared: int, distinct: int, listed: PhraseList) -> dict[str, tuple[float, float]]:
    figures = {"words": (float(len(found)), 1.0)}
    if not found:  # Nothing can be said about how it is written.
        return figures
    repeated, every = repeated_trigrams(found)
    return figures | {
        "ttr": (type_token_ratio(found), 1.0),
        "mattr": (moving_average_ratio(found), 1.0),
        "rep3g": (float(repeated), float(every)),
        "cross_document_trigrams": (float(shared), float(distinct)),
        "slop_per_1k_words": (1000.0 * listed.count(found), float(len(found))),
    }


def _phrases(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").splitlines()
    found = []
    for line, record in open_records(path):
        if not isinstance(record, dict) or not isinstance(record.get("phrase"), str):
            raise DataError(f"task style: {path} line {line} has no `phrase`")
        found.append(record["phrase"])
    return found
