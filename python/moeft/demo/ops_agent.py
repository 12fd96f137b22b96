"""A seeded generator of ops-agent chat rows: a request in English, answered by exactly one tool call.

A row is ``{"messages": [{"role": "user", ...}, {"role": "assistant", "content": '[TOOL: name key="value"]'}]}``.

What is held out: for every tool, a share of its *argument combinations*. ``restart_service`` with ``search`` in
``staging`` may be held out while both values occur in training, apart from each other, so a model passes only if it has
learnt to read the arguments from the request. Phrasings are shared between both sides; request texts never repeat.
"""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from moeft.demo.ops_vocabulary import CLOSERS, OPENERS, TOOLS, VALUES, Tool
from moeft.tool_protocols import ToolCall
from moeft.tool_protocols.bracket import format_tool_call

HELDOUT_SHARE = 0.2
"""Share of each tool's argument combinations that never occur in training."""

Row = dict[str, Any]
_Item = TypeVar("_Item")


def generate(seed: int, train_rows: int = 3000, heldout_rows: int = 200) -> tuple[list[Row], list[Row]]:
    """Write training and held-out rows; the same seed gives the same rows on every Python version.

    Args:
        seed: Seed of every choice.
        train_rows: Number of training rows.
        heldout_rows: Number of held-out rows.

    Returns:
        Training rows and held-out rows. Tools appear equally often, to within one row; no request text occurs twice,
        and no (tool, arguments) pair occurs on both sides.

    Raises:
        ValueError: If a tool has fewer distinct requests than rows are asked of it.
    """
    rng = random.Random(seed)
    train: list[Row] = []
    heldout: list[Row] = []
    for index, tool in enumerate(TOOLS):
        combinations = _shuffled(rng, list(itertools.product(*(VALUES[kind] for kind in tool.arguments.values()))))
        cut = max(1, int(len(combinations) * HELDOUT_SHARE))
        heldout += _rows(rng, tool, combinations[:cut], _quota(heldout_rows, index))
        train += _rows(rng, tool, combinations[cut:], _quota(train_rows, index))
    return _shuffled(rng, train), _shuffled(rng, heldout)


def write_jsonl(rows: Sequence[Row], path: str | Path) -> None:
    """Write one JSON object per line, UTF-8."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _quota(rows: int, index: int) -> int:
    """Rows of the tool at ``index`` when ``rows`` are dealt out evenly."""
    return rows // len(TOOLS) + (index < rows % len(TOOLS))


def _rows(rng: random.Random, tool: Tool, combinations: Sequence[tuple[str, ...]], count: int) -> list[Row]:
    """Make ``count`` rows with distinct requests, walking through the combinations in turn."""
    distinct = len(combinations) * len(tool.phrasings) * len(set(OPENERS)) * len(set(CLOSERS))
    # Drawing without repetition slows down as the pool empties; half of it keeps the loop short.
    if count > distinct // 2:
        raise ValueError(
            f"{tool.name} has room for {distinct // 2} distinct requests, {count} were asked for; ask for fewer rows"
        )
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < count:
        values = dict(zip(tool.arguments, combinations[len(rows) % len(combinations)], strict=True))
        request = _request(rng, tool, values)
        if request in seen:
            continue
        seen.add(request)
        rows.append(_row(request, format_tool_call(ToolCall(tool.name, values))))
    return rows


def _request(rng: random.Random, tool: Tool, values: dict[str, str]) -> str:
    text = _pick(rng, OPENERS) + _pick(rng, tool.phrasings).format(**values) + _pick(rng, CLOSERS)
    return text[0].upper() + text[1:]


def _row(request: str, reply: str) -> Row:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": reply}]}


# Python promises to keep the sequence of Random.random() between versions, not that of choice() and shuffle().
def _pick(rng: random.Random, items: Sequence[_Item]) -> _Item:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[_Item]) -> list[_Item]:
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result
