"""Sections of a pipeline's report: held-out pairs before and after preference tuning, and rounds of the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeft.reports.text import number, percent, table

FIGURES = (
    "log_probs/accuracy",
    "rewards/accuracy",
    "rewards/margin",
    "log_probs/chosen_drift",
    "lengths/won",
    "lengths/lost",
    "kl",
)


def preference_section(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Figures of held-out pairs, a row for each seed and figure.

    Args:
        name: Name of the stage.
        found: ``seed``, and ``heldout`` as in ``metrics.json`` of ``moeft dpo``.
    """
    rows = [
        [figure, entry["seed"], *(number(entry["heldout"][when].get(figure)) for when in ("before", "after"))]
        for entry in found
        for figure in FIGURES
    ]
    return f"## {name}: held-out pairs\n\n" + table(["figure", "seed", "before", "after"], rows)


def rounds_section(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of every round, why rounds ended, and the trend picture.

    Args:
        name: Name of the stage.
        found: ``seed``, ``rounds``, ``best``, ``ended`` and ``picture``, its path from the report, or None.
    """
    rows = [
        [place, entry["seed"], _interval(one["accuracy"]), number(one["gate_loss"])]
        for entry in found
        for place, one in enumerate(entry["rounds"])
    ]
    parts = [f"## {name}: rounds\n", table(["round", "seed", "right replies", "loss of the gate"], rows)]
    for entry in found:
        parts.append(f"Best round: {entry['best']}; ended: {entry['ended']}.\n")
        if entry["picture"] is not None:
            parts.append(f"![Right replies over rounds]({entry['picture']})\n")
    return "\n".join(parts)


def _interval(accuracy: Mapping[str, Any]) -> str:
    return f"{percent(accuracy['value'])} ({percent(accuracy['low'])} to {percent(accuracy['high'])})"
