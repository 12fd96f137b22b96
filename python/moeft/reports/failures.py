"""``failures.md`` of an analysis: accuracy, failures, tools, and which one was called for which."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeft.reports.plots import plot_confusion
from moeft.reports.text import cell, percent, table

EXAMPLES = 10


def write_failures(analysis: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write ``failures.md`` and ``confusion.png`` into a folder.

    Args:
        analysis: From ``moeft.hard.analysis.Analysis.to_json``.
        examples: Failures with ``request``, ``reply`` and ``reason``; the first few are shown.
        folder: Where to.

    Raises:
        MissingExtraError: If matplotlib is not installed; the text is written then.
    """
    confusion = analysis["confusion"]
    tools = [[name, _estimate(f["precision"]), _estimate(f["recall"])] for name, f in analysis["tools"].items()]
    wrong = [
        [wanted, called, count]
        for wanted, row in confusion.items()
        for called, count in sorted(row.items(), key=lambda item: -item[1])
        if called != wanted
    ]
    sections = [
        f"# Failures\n\n{analysis['replies']} replies, right: {_estimate(analysis['accuracy'])}.\n",
        "## By kind\n\n" + table(["failure", "replies"], [[n, c] for n, c in analysis["failures"].items()]),
        "## By tool\n\n" + table(["tool", "precision", "recall"], tools),
        "## Wanted and called\n\n" + table(["wanted", "called", "replies"], wrong),
        "![Called tools by wanted tool](confusion.png)\n",
        "## Examples\n\n"
        + table(
            ["request", "reply", "what is wrong"],
            [[cell(e["request"]), cell(e["reply"]), cell(e["reason"])] for e in examples[:EXAMPLES]],
        ),
    ]
    path = folder / "failures.md"
    path.write_text("\n".join(sections), encoding="utf-8")
    plot_confusion(confusion, folder / "confusion.png")
    return path


def _estimate(estimate: Mapping[str, Any] | None) -> str | None:
    if estimate is None:
        return None
    return f"{percent(estimate['value'])} ({percent(estimate['low'])} to {percent(estimate['high'])})"
