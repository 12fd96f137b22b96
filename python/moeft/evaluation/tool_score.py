"""Score of generated tool calls against references."""

from collections.abc import Sequence
from dataclasses import dataclass

from moeft.tool_protocols import ToolCallError
from moeft.tool_protocols.bracket import exact_match, parse_tool_call


@dataclass(frozen=True)
class Tally:
    """Counts over some replies, at least one."""

    count: int = 0
    valid: int = 0
    """Replies that are exactly one call of the protocol, right or wrong."""
    exact: int = 0
    """Replies with the reference's tool and arguments."""

    @property
    def valid_share(self) -> float:
        """Valid replies, 0 to 1."""
        return self.valid / self.count

    @property
    def exact_share(self) -> float:
        """Exact replies, 0 to 1."""
        return self.exact / self.count


@dataclass(frozen=True)
class ToolCallScore:
    """Counts over all replies, and per tool of the reference."""

    total: Tally
    per_tool: dict[str, Tally]
    """Name of the reference's tool -> counts, sorted by name."""

    @property
    def exact_share(self) -> float:
        """Share of all replies that are exact, 0 to 1."""
        return self.total.exact_share

    @property
    def valid_share(self) -> float:
        """Share of all replies that are valid calls, 0 to 1."""
        return self.total.valid_share

    def __str__(self) -> str:
        exact, valid, count = self.total.exact, self.total.valid, self.total.count
        return f"{exact} of {count} exact ({self.exact_share:.1%}), {valid} valid ({self.valid_share:.1%})"


def score_tool_calls(replies: Sequence[str], references: Sequence[str]) -> ToolCallScore:
    """Compare replies with references in the bracket protocol.

    Raises:
        ValueError: If the lengths differ, or there is nothing to score.
        ToolCallError: If a reference is not a call.
    """
    if len(replies) != len(references):
        raise ValueError(f"{len(replies)} replies for {len(references)} references, expected as many")
    if not references:
        raise ValueError("no replies to score")
    per_tool: dict[str, Tally] = {}
    for reply, reference in zip(replies, references, strict=True):
        name = parse_tool_call(reference).name
        tally = per_tool.get(name, Tally())
        per_tool[name] = Tally(
            tally.count + 1, tally.valid + _is_valid(reply), tally.exact + exact_match(reply, reference)
        )
    total = Tally(
        count=sum(tally.count for tally in per_tool.values()),
        valid=sum(tally.valid for tally in per_tool.values()),
        exact=sum(tally.exact for tally in per_tool.values()),
    )
    return ToolCallScore(total, dict(sorted(per_tool.items())))


def _is_valid(reply: str) -> bool:
    try:
        parse_tool_call(reply)
    except ToolCallError:
        return False
    return True
