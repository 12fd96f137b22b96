"""What a filter is, and the text of a row that filters look at."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from moeft.errors import MissingExtraError

if TYPE_CHECKING:
    from moeft.data.rows import Row

_WORD = re.compile(r"\w+")


class Filter(Protocol):
    """Decides on rows one after the other, in the order of the file; may remember those that it has seen."""

    name: str
    """Key of the recipe."""

    def reason(self, row: Row, place: str) -> str | None:
        """Why a row is left out, or None; ``place`` names its file and line."""
        ...


def text_of(row: Row, roles: tuple[str, ...] = ("system", "user", "assistant", "tool")) -> str:
    """Contents of the turns of these roles, one per line; of a document its text."""
    if row.text is not None:
        return row.text
    return "\n".join(message["content"] for message in row.messages if message["role"] in roles)


def words_of(text: str) -> list[str]:
    """Words in lower case, without what stands between them."""
    return _WORD.findall(text.lower())


def missing_extra(filter_name: str, package: str) -> MissingExtraError:
    """The error for a filter whose package is not installed."""
    return MissingExtraError(f"data.filters.{filter_name} needs {package}; pip install 'moeft[data]'")
