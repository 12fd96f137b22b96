"""Where the results of a finished run lie, and its report."""

from __future__ import annotations

from collections.abc import Callable

from moeft.errors import MissingExtraError
from moeft.provenance import RunFolder
from moeft.reports import write_report


def show_results(folder: RunFolder, show: Callable[[str], None]) -> None:
    """Write the report of a run that tuned a model, if pictures can be drawn, and name what the run left."""
    try:
        report = str(write_report(folder))
    except MissingExtraError as error:  # No reason to call a finished run failed.
        report = f"none yet, {error}"
    for name in ("adapter", "trained"):
        if (folder.path / name).exists():
            show(f"{name}: {folder.path / name}")
    merge = folder.record["recipe"]["merge"]
    if merge is not None:
        show(f"merged: {merge['output']}")
    show(f"report: {report}")
    show(f"Run folder: {folder.path}")
