"""What is wrong with a reply, against the calls that would be right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moeft.data.tool_schemas import ToolSchemas
from moeft.tool_protocols import ToolCall, ToolCallError, ToolProtocol

REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|can(?:no|')t|can not|unable|not able|won't|will not|not allowed|don't have)\b",
    re.IGNORECASE,
)
TALK_CHARACTERS = 200
"""More text beside right calls than the reference has, and so many characters, is thinking too long."""


@dataclass(frozen=True)
class Verdict:
    """Of one reply.

    Attributes:
        category: Of the failure, one of :data:`moeft.hard.categories.CATEGORIES`; None for a right reply.
        reason: What is wrong, in words.
        actual: Names of the tools that were called; "invalid" for a call that cannot be read.
    """

    category: str | None
    reason: str
    actual: tuple[str, ...]


def judge(
    text: str, expected: Sequence[ToolCall], schemas: ToolSchemas, protocol: ToolProtocol, said: str = ""
) -> Verdict:
    """Compare a reply with the right calls; calls of one turn have no order.

    Args:
        text: The whole reply.
        expected: The right calls; none where nothing is to be called.
        schemas: The tools on offer.
        protocol: How calls are written.
        said: What the reference says beside its calls.
    """
    try:
        reply = protocol.parse(text)
    except ToolCallError as error:
        return Verdict("format_break", str(error), ("invalid",))
    calls = [protocol.typed(call, schemas) for call in reply.calls]
    wanted = [protocol.typed(call, schemas) for call in expected]
    actual = tuple(call.name for call in calls)
    category, reason = _compare(calls, wanted, schemas, reply.said)
    if category is None and len(reply.said) > len(said) + TALK_CHARACTERS:
        category, reason = "overthinking", f"says {len(reply.said)} characters beside its calls"
    return Verdict(category, reason, actual)


def _compare(calls: list[ToolCall], wanted: list[ToolCall], schemas: ToolSchemas, said: str) -> tuple[str | None, str]:
    names, right = sorted(call.name for call in calls), sorted(call.name for call in wanted)
    if not calls and wanted:
        refuses = REFUSAL.search(said) is not None
        category = "refusal_when_answerable" if refuses else "premature_answer"
        return category, f"{'refuses' if refuses else 'answers'} without calling {', '.join(right)}"
    if calls and not wanted:
        return "missing_tool", f"calls {', '.join(names)}, where no tool does what is asked"
    for call in calls:
        unknown = call.name not in schemas.names
        invented = [] if unknown else [key for key in call.arguments if key not in schemas.properties(call.name)]
        if unknown or (invented and schemas.properties(call.name)):
            return "hallucination_guard", f"calls {call.name} with {invented[0]}" if invented else f"calls {call.name}"
    if len(calls) != len(wanted):
        return "multi_tool", f"calls {', '.join(names)} instead of {', '.join(right)}"
    if names != right:
        return "tool_confusion", f"calls {', '.join(names)} instead of {', '.join(right)}"
    left = list(wanted)
    for call in calls:
        if call not in left:
            same = next(other for other in wanted if other.name == call.name)
            return "wrong_params", f"calls {call.name} with {dict(call.arguments)} instead of {dict(same.arguments)}"
        left.remove(call)
    return None, ""
