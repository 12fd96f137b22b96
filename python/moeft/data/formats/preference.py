"""Pairs of a chosen and a rejected answer, known here so that supervised training does not take them for chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeft.data.formats.format import Format, Parsed
from moeft.errors import DataError


def parse(record: Mapping[str, Any]) -> Parsed:
    """Refuse the row.

    Raises:
        DataError: Always.
    """
    raise DataError("the row is a preference pair (chosen, rejected); it is read by data.preferences, not as a chat")


FORMAT = Format("preference", (("chosen", "rejected"),), parse)
