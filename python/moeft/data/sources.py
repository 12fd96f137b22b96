"""The sources of a recipe: read, given their system turn, filtered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moeft.data.files.tables import read_hub_dataset
from moeft.data.filters import apply_filters, build_filters
from moeft.data.filters.length import CountTokens
from moeft.data.rows import Message, Row, Rows, read_rows
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.config.sft import Data
    from moeft.config.sources import Source
    from moeft.data.filters.filter import Filter


def read_sources(
    data: Data, count_tokens: CountTokens | None = None, show: Callable[[str], None] = lambda text: None
) -> list[Rows]:
    """Read all training sources of a recipe.

    Filters of ``data`` see all sources one after the other, so that a duplicate in a later source is one; a source with
    filters of its own has only these.

    Args:
        data: The recipe's section.
        count_tokens: Tokens of a text, for bounds in tokens.
        show: Where to print what each source holds.

    Raises:
        DataError: If a source cannot be read, too many of its rows cannot, or none is left.
        MissingExtraError: If a filter needs a package that is not installed.
    """
    common = build_filters(data.filters, count_tokens)
    read: list[Rows] = []
    for source in data.train:
        own = common if source.filters is None else build_filters(source.filters, count_tokens)
        rows = read_source(source, data, own)
        show(str(rows))
        read.append(rows)
    return read


def read_source(source: Source, data: Data, filters: Sequence[Filter] = ()) -> Rows:
    """Read one source; see :func:`read_sources`."""
    rows = read_rows(
        source.path or (record for _, record in read_hub_dataset(source.hub or "", source.split, source.revision)),
        format=source.format or data.format,
        turns=source.turns or data.turns,
        max_reject_share=data.max_reject_share,
        source=str(source.path or source.hub),
    )
    if source.system is not None:
        rows = dataclasses.replace(rows, rows=[_with_system(row, source.system) for row in rows.rows])
    rows = apply_filters(rows, filters) if filters else rows
    if not rows.rows:
        counts = ", ".join(f"{name} {count}" for name, count in rows.filtered.items())
        raise DataError(f"{rows.source}: the filters leave no row ({counts}); loosen them, or drop the source")
    return rows


def _with_system(row: Row, system: str) -> Row:
    if row.text is not None or row.messages[0]["role"] == "system":
        return row
    first: Message = {"role": "system", "content": system}
    return dataclasses.replace(row, messages=[first, *row.messages])
