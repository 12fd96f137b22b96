"""Progress bars: of work that is counted in bytes, as in the Rust core, and of work that is counted in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Callback = Callable[[int, int, str], None]


@contextmanager
def byte_bar(title: str, shown: bool) -> Iterator[Callback | None]:
    """A callback ``(done, total, what)`` in bytes that draws a bar; None if nothing is to be shown."""
    if not shown:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {what.rpartition('/')[2][-40:]}")

        yield advance


@contextmanager
def step_bar(title: str, shown: bool) -> Iterator[Callback | None]:
    """A callback ``(done, total, what)`` in steps that draws a bar; None if nothing is to be shown."""
    if not shown:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {what[-40:]}")

        yield advance
