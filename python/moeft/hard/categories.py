"""The categories of hard pairs, and what makes a pair of each."""

from __future__ import annotations

from collections.abc import Callable

from moeft.hard import wrong_calls, wrong_turns
from moeft.hard.draft import Draft
from moeft.hard.requests import Request
from moeft.hard.workshop import Workshop

Maker = Callable[[Workshop, Request], Draft | None]

CATEGORIES: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        wrong_calls.tool_confusion,
        wrong_turns.multi_tool,
        wrong_turns.overthinking,
        wrong_turns.adversarial_user,
        wrong_calls.recovery,
        wrong_calls.hallucination_guard,
        wrong_calls.wrong_params,
        wrong_calls.edge_case,
        wrong_turns.missing_tool,
        wrong_turns.premature_answer,
        wrong_calls.format_break,
        wrong_turns.refusal_when_answerable,
        wrong_calls.stale_context,
    )
}
"""By name."""

CALL_ONLY = frozenset(
    ("tool_confusion", "recovery", "hallucination_guard", "wrong_params", "edge_case", "format_break", "stale_context")
)
"""Those whose answers may share right reasoning, so that only the call is wrong."""
