"""Filters of rows: each a file here and a key of the recipe's ``data.filters``."""

from __future__ import annotations

from moeft.config.filters import Filters
from moeft.data.filters.contamination import ContaminationFilter
from moeft.data.filters.duplicates import DuplicatesFilter
from moeft.data.filters.filter import Filter
from moeft.data.filters.language import LanguageFilter
from moeft.data.filters.length import CountTokens, LengthFilter
from moeft.data.filters.near_duplicates import NearDuplicatesFilter
from moeft.data.filters.tool_calls import ToolCallsFilter


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
