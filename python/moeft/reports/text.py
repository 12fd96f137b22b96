"""Pieces of Markdown: tables, fenced text, numbers with their units."""

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; every column after the first is right-aligned. Cells are escaped."""
    rules = ["---", *["---:"] * (len(header) - 1)]
    lines = [" | ".join(cell(value) for value in row) for row in (header, *rows)]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join(rules), *lines[1:])) + "\n"


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values; rows without a value are left out."""
    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def cell(value: object) -> str:
    """Text that cannot break out of a table cell."""
    return re.sub(r"\s+", " ", number(value)).replace("\\", "\\\\").replace("|", "\\|").strip()


def fence(text: str, language: str = "") -> str:
    """Text as a code block, whatever backticks it holds itself."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    end = "" if text.endswith("\n") else "\n"
    return f"{ticks}{language}\n{text}{end}{ticks}\n"


def number(value: object) -> str:
    """A number with thousands separators or four significant digits; anything else as text, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mib(size_bytes: float) -> str:
    """Bytes in MiB, or in KiB below a tenth of one."""
    size = size_bytes / 2**20
    if 0 < size < 0.1:
        return f"{size_bytes / 2**10:.3g} KiB"
    return f"{size:,.0f} MiB" if size >= 100 else f"{size:.3g} MiB"


def percent(share: float | None) -> str:
    """A share between 0 and 1 in percent; a dash if it was not measured."""
    return "–" if share is None else f"{100 * share:.1f} %"
