"""The training sources of a recipe: read when they are asked for, given their system turn, filtered."""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING

from moeft.data.files.tables import read_hub_dataset
from moeft.data.filters import build_filters
from moeft.data.filters.length import CountTokens
from moeft.data.reading import RowReader, RowStream

if TYPE_CHECKING:
    from moeft.config.sft import Data
    from moeft.data.filters.filter import Filter


class Sources:
    """Reads the sources of a recipe, each once and in their order.

    Filters of ``data`` see the sources one after the other, so that a duplicate in a later source is one; a source with
    filters of its own has only these.

    Args:
        data: The recipe's section.
        count_tokens: Tokens of a text, for bounds in tokens.
    """

    def __init__(self, data: Data, count_tokens: CountTokens | None = None) -> None:
        self._data = data
        self._count_tokens = count_tokens
        self._next = 0

    def stream(self, index: int) -> RowStream:
        """The rows of a source.

        Sources before it that were not asked for are read as well, if filters have to compare its rows with theirs.

        Raises:
            DataError: If an evaluation set cannot be used; while it is iterated, if the source cannot be read, too many
                of its rows cannot, or none is left. So do sources that are read before it.
            FileNotFoundError: If a file does not exist.
            MissingExtraError: If a filter needs a package that is not installed.
        """
        if self._data.filters.compare_rows and self._data.train[index].filters is None:
            for earlier in range(self._next, index):
                if self._data.train[earlier].filters is None:
                    deque(self._open(earlier), maxlen=0)
        self._next = index + 1
        return self._open(index)

    @cached_property
    def _common(self) -> list[Filter]:
        return build_filters(self._data.filters, self._count_tokens)

    def _open(self, index: int) -> RowStream:
        source, data = self._data.train[index], self._data
        reader = RowReader(
            source.path or (record for _, record in read_hub_dataset(source.hub or "", source.split, source.revision)),
            format=source.format or data.format,
            turns=source.turns or data.turns,
            source=str(source.path or source.hub),
        )
        filters = self._common if source.filters is None else build_filters(source.filters, self._count_tokens)
        return RowStream(reader, max_reject_share=data.max_reject_share, system=source.system, filters=filters)
