"""Failures of a model's replies: what went wrong, which tool was taken for which, and what to train against it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeft.data.tool_schemas import ToolSchemas
from moeft.evaluation.statistics import Estimate, wilson
from moeft.hard.judge import Verdict, judge
from moeft.hard.requests import Request
from moeft.hard.targets import FLOOR, Targets
from moeft.tool_protocols import ToolProtocol

NONE, INVALID = "(none)", "invalid"
"""In place of a tool: nothing was called, or nothing that could be read."""


@dataclass(frozen=True)
class ToolFigures:
    """Of one tool.

    Attributes:
        precision: Share of its calls that were wanted; None if it was never called.
        recall: Share of requests for it that called it; None if it was never wanted.
    """

    precision: Estimate | None
    recall: Estimate | None


@dataclass(frozen=True)
class Analysis:
    """What became of a benchmark.

    Attributes:
        verdicts: Of each reply.
        accuracy: Share of right replies.
        confusion: Wanted tool -> tool that was called -> replies; ``(none)`` and ``invalid`` stand for no tool.
        tools: By name.
        targets: For the next build.
    """

    verdicts: list[Verdict]
    accuracy: Estimate
    confusion: dict[str, dict[str, int]]
    tools: dict[str, ToolFigures]
    targets: Targets

    @property
    def failures(self) -> dict[str, int]:
        """Replies by what is wrong with them, most first."""
        found = Counter(verdict.category for verdict in self.verdicts if verdict.category is not None)
        return dict(found.most_common())

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return {
            "replies": len(self.verdicts),
            "accuracy": self.accuracy.to_json(),
            "failures": self.failures,
            "confusion": self.confusion,
            "tools": {
                name: {
                    "precision": figures.precision and figures.precision.to_json(),
                    "recall": figures.recall and figures.recall.to_json(),
                }
                for name, figures in self.tools.items()
            },
        }


def analyze(
    requests: Sequence[Request], replies: Sequence[str], schemas: ToolSchemas, protocol: ToolProtocol
) -> Analysis:
    """Judge replies and count.

    Args:
        requests: Prompts with the right calls.
        replies: What the model wrote, in the same order.
        schemas: The tools.
        protocol: How calls are written.

    Raises:
        ValueError: If there are not as many replies as requests, or none.
    """
    if len(requests) != len(replies) or not requests:
        raise ValueError(f"{len(replies)} replies for {len(requests)} requests, expected as many and at least one")
    verdicts = [
        judge(reply, request.calls, schemas, protocol, request.said)
        for request, reply in zip(requests, replies, strict=True)
    ]
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    wanted_count, called_count, hit_count = Counter[str](), Counter[str](), Counter[str]()
    for request, verdict in zip(requests, verdicts, strict=True):
        wanted = Counter(call.name for call in request.calls)
        called = Counter(verdict.actual)
        hits = wanted & called
        wanted_count, called_count, hit_count = wanted_count + wanted, called_count + called, hit_count + hits
        for expected, actual in _paired(wanted, called):
            confusion[expected][actual] += 1
    right = sum(verdict.category is None for verdict in verdicts)
    names = [name for name in schemas.names if wanted_count[name] or called_count[name]]
    tools = {
        name: ToolFigures(
            wilson(hit_count[name], called_count[name]) if called_count[name] else None,
            wilson(hit_count[name], wanted_count[name]) if wanted_count[name] else None,
        )
        for name in names
    }
    table = {expected: dict(row) for expected, row in sorted(confusion.items())}
    return Analysis(verdicts, wilson(right, len(verdicts)), table, tools, _targets(requests, verdicts, table))


def _paired(wanted: Counter[str], called: Counter[str]) -> list[tuple[str, str]]:
    """Wanted tools beside those called: the same ones first, the rest in order."""
    same = [(name, name) for name in (wanted & called).elements()]
    left, right = list((wanted - called).elements()), list((called - wanted).elements())
    rest = max(len(left), len(right))
    left, right = left + [NONE] * (rest - len(left)), right + [NONE] * (rest - len(right))
    pairs = same + list(zip(left, right, strict=True))
    return pairs or [(NONE, NONE)]


def _targets(requests: Sequence[Request], verdicts: Sequence[Verdict], confusion: dict[str, dict[str, int]]) -> Targets:
    """Weights by failure rate, with a floor for what did not fail."""
    from moeft.hard.categories import CATEGORIES

    failures = Counter(verdict.category for verdict in verdicts if verdict.category is not None)
    total = max(sum(failures.values()), 1)
    categories = {name: FLOOR + failures[name] / total for name in CATEGORIES}
    asked, failed = Counter[str](), Counter[str]()
    for request, verdict in zip(requests, verdicts, strict=True):
        names = {call.name for call in request.calls}
        asked.update(names)
        failed.update(names if verdict.category is not None else ())
    tools = {name: FLOOR + failed[name] / asked[name] for name in asked}
    wrong = {
        expected: {name: float(count) for name, count in row.items() if name not in (expected, NONE, INVALID)}
        for expected, row in confusion.items()
        if expected != NONE
    }
    return Targets(categories, tools, {expected: row for expected, row in wrong.items() if row})
