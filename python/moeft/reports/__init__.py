"""Reports of a run folder: Markdown and pictures. They show what was measured and measure nothing."""

from moeft.reports.markdown import write_report

__all__ = ["write_report"]
