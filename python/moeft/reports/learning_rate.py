"""The section of a report about a learning rate that was found by a range test."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft.reports.plots import plot_rates
from moeft.reports.text import number, table


def learning_rate_section(found: Mapping[str, Any] | None, folder: Path) -> str:
    """Table and picture of the curve; empty for a rate that the recipe gives. Writes ``learning_rate.png``.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    if not found:
        return ""
    plot_rates(found["points"], found["bound"], found["rate"], folder / "learning_rate.png")
    rows = [
        [point["rate"], point["divergence"], point["loss"], "kept" if point["is_within"] else "broken"]
        for point in found["points"]
    ]
    return (
        "## Learning rate\n\n"
        + f"{number(found['rate'])}, the largest whose divergence from the base after {found['steps']} steps is within "
        + f"{number(found['bound'])} nats per token: {number(found['limit'])} for all {number(found['planned_steps'])} "
        + "steps, in proportion.\n\n"
        + table(["rate", "KL(base, model)", "loss", "bound"], rows)
        + "\n![Divergence by learning rate](learning_rate.png)\n"
    )
