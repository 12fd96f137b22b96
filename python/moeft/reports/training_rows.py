"""What a run was trained on, as a section of its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeft.reports.text import facts, percent, table


def data_section(data: Mapping[str, Any] | None, composition: Sequence[Mapping[str, Any]] | None) -> str:
    """Counts, and the sources with their shares."""
    if not data:
        return ""
    return "## Data\n\n" + facts(list(data.items())) + ("\n" + _composition(composition) if composition else "")


def _composition(parts: Sequence[Mapping[str, Any]]) -> str:
    header = ["source", "rejected", "available", "rows", "tokens", "trained", "of rows", "of trained"]
    figures = ("rejected", "available", "rows", "tokens", "trained_tokens")
    shares = ("share_of_rows", "share_of_trained_tokens")
    return table(
        header,
        [[part["name"], *(part[key] for key in figures), *(percent(part[key]) for key in shares)] for part in parts],
    )
