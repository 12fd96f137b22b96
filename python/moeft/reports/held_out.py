"""What a run measured on held-out rows, before and after training, as sections of its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeft.reports.text import number, percent, table

Figures = Mapping[str, Any]

_PAIR_SHARES = {
    "log_probs/accuracy": "pairs whose chosen answer is the likelier one",
    "rewards/accuracy": "pairs whose chosen answer is preferred, against the reference",
}
_PAIR_FIGURES = {
    "rewards/margin": "margin of rewards",
    "rewards/chosen": "reward of the chosen answer",
    "rewards/rejected": "reward of the rejected answer",
    "log_probs/chosen_drift": "drift of the chosen answer, nats per token",
    "kl": "divergence from the reference, nats per token",
    "lengths/won": "tokens of chosen less rejected, pairs won",
    "lengths/lost": "tokens of chosen less rejected, pairs lost",
}
"""Figures of held-out preference pairs."""


def held_out_sections(heldout: Mapping[str, Figures] | None) -> list[str]:
    """Loss and tool calls, perplexity by turn, and recall; what was not measured is left out."""
    if not heldout:
        return []
    before, after = heldout.get("before", {}), heldout.get("after", {})
    return [section for section in (_rows(before, after), _turns(before, after), _recall(before, after)) if section]


def _rows(before: Figures, after: Figures) -> str:
    if not any(key in side for side in (before, after) for key in ("loss", "exact_match")):
        return ""
    rows = after.get("rows", before.get("rows"))
    is_pairs = "rewards/accuracy" in {**before, **after}
    lines: list[list[Any]] = [
        ["loss of pairs" if is_pairs else "loss, nats per token", before.get("loss"), after.get("loss")],
        ["tool calls that match exactly", percent(before.get("exact_match")), percent(after.get("exact_match"))],
    ]
    if is_pairs:
        for key, label in _PAIR_SHARES.items():
            lines.append([label, percent(before.get(key)), percent(after.get(key))])
        lines += [[label, before.get(key), after.get(key)] for key, label in _PAIR_FIGURES.items()]
    return "## Held-out rows\n\n" + table([f"{number(rows)} rows", "before", "after"], lines)


def _turns(before: Figures, after: Figures) -> str:
    if not (pairs := _pairs(before, after, "turns", "turn")):
        return ""
    rows = [
        [turn, one["perplexity"]["num"], one["tokens"], _estimate(left, "perplexity"), _estimate(right, "perplexity")]
        for turn, left, right in pairs
        if (one := left or right)
    ]
    header = ["turn of the assistant", "conversations", "tokens", "before", "after"]
    return "## Perplexity by turn\n\n" + table(header, rows)


def _recall(before: Figures, after: Figures) -> str:
    if not (pairs := _pairs(before, after, "recall", "distance")):
        return ""
    rows = []
    for distance, left, right in pairs:
        one = left or right or {}
        row = [distance, percent(one["chance"])]
        for key in ("accuracy", "margin", "generated"):
            row += [_estimate(left, key), _estimate(right, key)]
        rows.append(row)
    names = ("most probable", "margin, nats", "generated")
    header = ["exchanges between", "by chance", *(f"{name}, {when}" for name in names for when in ("before", "after"))]
    return "## Recall of early facts\n\n" + table(header, rows)


def _pairs(before: Figures, after: Figures, name: str, key: str) -> list[tuple[int, Figures | None, Figures | None]]:
    sides: list[dict[int, Figures]] = [{item[key]: item for item in side.get(name, ())} for side in (before, after)]
    return [(place, sides[0].get(place), sides[1].get(place)) for place in sorted({**sides[0], **sides[1]})]


def _estimate(figures: Figures | None, key: str) -> str:
    """A figure with its interval, or a dash."""
    found: Mapping[str, Any] | None = (figures or {}).get(key)
    if found is None:
        return number(None)
    ends: Sequence[float | None] = (found["low"], found["high"])
    interval = "" if None in ends else f" ({number(ends[0])} to {number(ends[1])})"
    return number(found["value"]) + interval
