"""``moeft report``: the report of a run folder."""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.md with tables and pictures into the run folder of a training, a demo or a pipeline."""
    from moeft.provenance import RunFolder
    from moeft.reports import write_report
    from moeft.reports.pipeline import write_pipeline_report

    folder = RunFolder.open(run)
    is_pipeline = folder.record["command"] == "moeft run"
    print(write_pipeline_report(folder) if is_pipeline else write_report(folder))
