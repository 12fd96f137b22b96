"""Perplexity of texts: pages of WikiText, or rows of any file with a ``text``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeft.errors import DataError
from moeft.evaluation.request import Answer, Text
from moeft.evaluation.sources import Hub, Record, read_rows
from moeft.evaluation.task import Item, Metric, Task

WIKITEXT = Hub("EleutherAI/wikitext_document_level", "test", "wikitext-2-raw-v1")

PER_WORD = Metric("word_perplexity", "lower", "perplexity")
PER_BYTE = Metric("byte_perplexity", "lower", "perplexity")
BITS = Metric("bits_per_byte", "lower")
PER_TOKEN = Metric("token_perplexity", "lower", "perplexity")

# Formulas look like headings; only a heading has an empty line on both sides.
_HEADING = re.compile(r"(?<![^\n] )^ ?\n = (?!=).*(?<!=) = ?\n(?= ?\n)", re.MULTILINE)
_DETOKENISED = (
    # WikiText sets marks apart from words; these put them back, in this order.
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


def wikitext_rows(path: Path) -> list[Record]:
    """Pages of WikiText's plain text, or of a file of rows."""
    return wikitext_file(path) if path.suffix in (".txt", ".tokens") else read_rows("wikitext", path, WIKITEXT)


def wikitext_file(path: Path) -> list[Record]:
    """Pages of a WikiText file of plain text.

    Raises:
        DataError: If there is no such file, or no page in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"task wikitext: there is no {path}; it is a plain text of WikiText-2, or a file of rows with a `page`"
        ) from error
    starts = [match.start() for match in _HEADING.finditer(text)]
    if not starts:
        raise DataError(f"task wikitext: {path} has no page, expected headings such as ' = Title = '")
    ends = [*starts[1:], len(text)]
    return [(str(i), {"page": text[a:b]}) for i, (a, b) in enumerate(zip(starts, ends, strict=True), start=1)]


def wikitext(rows: Sequence[Record]) -> Task:
    """WikiText by page, as lm-eval counts it: text put back as people write it, words and bytes those of the page."""
    return perplexity_task("wikitext", rows, "page", detokenise)


def perplexity(rows: Sequence[Record]) -> Task:
    """Rows with a ``text``, as it is."""
    return perplexity_task("perplexity", rows, "text", str)


def perplexity_task(name: str, rows: Sequence[Record], column: str, written: Any) -> Task:
    """A task over texts; ``written`` makes what the model reads of what the row holds.

    Raises:
        DataError: If a row has no such text.
    """
    items = []
    for line, row in rows:
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"task {name}: row {line} has no text in `{column}`; its columns are {', '.join(row)}")
        counts = {"words": len(re.split(r"\s+", text)), "bytes": len(text.encode())}
        items.append(Item(line, Text(written(text)), counts))
    return Task(name, tuple(items), (PER_WORD, PER_BYTE, BITS, PER_TOKEN), _grade)


def detokenise(page: str) -> str:
    """WikiText's spaced-out marks back to ordinary text."""
    for pattern, replacement in _DETOKENISED:
        page = re.sub(pattern, replacement, page)
    return page


def _grade(answered: Sequence[tuple[Item, Answer]]) -> list[Mapping[str, tuple[float, float]]]:
    graded: list[Mapping[str, tuple[float, float]]] = []
    for item, answer in answered:
        log_prob, counts = answer["log_prob"], item.reference
        graded.append(
            {
                PER_WORD.name: (log_prob, counts["words"]),
                PER_BYTE.name: (log_prob, counts["bytes"]),
                BITS.name: (-log_prob / math.log(2), counts["bytes"]),
                PER_TOKEN.name: (log_prob, answer["tokens"]),
            }
        )
    return graded
