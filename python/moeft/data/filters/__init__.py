"""Filters of rows: each a file here and a key of the recipe's ``data.filters``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeft.config.filters import Filters
from moeft.data.filters.contamination import ContaminationFilter
from moeft.data.filters.duplicates import DuplicatesFilter
from moeft.data.filters.filter import Filter
from moeft.data.filters.language import LanguageFilter
from moeft.data.filters.length import CountTokens, LengthFilter
from moeft.data.filters.near_duplicates import NearDuplicatesFilter
from moeft.data.filters.tool_calls import ToolCallsFilter
from moeft.data.rejects import Reject

if TYPE_CHECKING:
    from moeft.data.rows import Row, Rows


def build_filters(wanted: Filters, count_tokens: CountTokens | None = None) -> list[Filter]:
    """The filters of a recipe, cheap ones first; duplicates last, so that the row that stays is one that is used.

    Args:
        wanted: The recipe's section.
        count_tokens: Tokens of a text, for bounds in tokens.

    Raises:
        DataError: If an evaluation set cannot be used.
        MissingExtraError: If a filter needs a package that is not installed.
        ValueError: If bounds are in tokens without ``count_tokens``, or a language is unknown.
    """
    filters: list[Filter] = []
    if wanted.length is not None:
        filters.append(LengthFilter(wanted.length, count_tokens))
    if wanted.tool_calls:
        filters.append(ToolCallsFilter())
    if wanted.language is not None:
        filters.append(LanguageFilter(wanted.language))
    if wanted.contamination is not None:
        filters.append(ContaminationFilter(wanted.contamination))
    if wanted.duplicates:
        filters.append(DuplicatesFilter())
    if wanted.near_duplicates is not None:
        filters.append(NearDuplicatesFilter(wanted.near_duplicates))
    return filters


def apply_filters(rows: Rows, filters: Sequence[Filter]) -> Rows:
    """Leave out what a filter refuses; the first that does gives the reason, and later ones do not see the row."""
    kept: list[Row] = []
    rejects: list[Reject] = []
    counts = Counter({filter.name: 0 for filter in filters})
    for row in rows.rows:
        for filter in filters:
            reason = filter.reason(row, f"{rows.source} line {row.line}")
            if reason is not None:
                counts[filter.name] += 1
                rejects.append(Reject(row.line, f"{filter.name}: {reason}", rows.source))
                break
        else:
            kept.append(row)
    everything = sorted([*rows.rejects, *rejects], key=lambda reject: reject.line)
    return dataclasses.replace(rows, rows=kept, rejects=everything, filtered=dict(counts))
