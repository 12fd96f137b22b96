"""``moeft report``: the report of a run folder."""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.md with tables and pictures into a run folder."""
    from moeft.reports import write_report

    print(write_report(run))
