"""Formats of chat rows: how each is known by its keys, and how it becomes messages.

A format is a file here and an entry of :data:`FORMATS`. Every row is told by its own keys, so a file may hold several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeft.data.formats import (
    alpaca,
    glaive,
    messages,
    plain_text,
    preference,
    prompt_completion,
    prompt_response,
    sharegpt,
)
from moeft.data.formats.format import Format, Parsed, kind
from moeft.errors import DataError

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        preference.FORMAT,
        messages.FORMAT,
        sharegpt.FORMAT,
        alpaca.FORMAT,
        prompt_completion.FORMAT,
        prompt_response.FORMAT,
        glaive.FORMAT,
        plain_text.FORMAT,
    )
}
"""Formats by name, in the order in which keys are compared: a row with the keys of two is of the first."""


class Detector:
    """Turns rows of any format into messages.

    Args:
        format: Name of the only format to accept; None tells each row by its keys.

    Raises:
        ValueError: If there is no format of that name.
    """

    def __init__(self, format: str | None = None) -> None:
        if format is not None and format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        self._forced = None if format is None else FORMATS[format]

    def parse(self, record: Any) -> tuple[str, Parsed]:
        """Name of the format of a record, and what the record says.

        Raises:
            DataError: If the record is of no known format, or not what its format demands.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"the row is {kind(record)}, expected an object")
        format = self._forced or self._detect(record)
        return format.name, format.parse(record)

    def _detect(self, record: Mapping[str, Any]) -> Format:
        for format in FORMATS.values():
            if format.matches(record):
                return format
        keys = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(
            f"keys are {keys}; expected messages, conversations, prompt and completion, or those of another format "
            "of docs/data.md"
        )
