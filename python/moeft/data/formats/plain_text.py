"""``text``: a document, or a conversation written with the turn markers of Gemma, Gemma 4 or ChatML, or as Glaive's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeft.data.formats import glaive
from moeft.data.formats.format import Format, Parsed, kind
from moeft.data.formats.turn_markers import marked_turns
from moeft.errors import DataError


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read a text; one that begins with a turn marker becomes turns, any other counts as a whole.

    Raises:
        DataError: If it is no text, is empty, or is marked and broken.
    """
    text = record.get("text")
    if not isinstance(text, str):
        raise DataError(f"text is {kind(text)}, expected a string")
    if not text.strip():
        raise DataError("text is empty")
    turns = marked_turns(text)
    if turns is not None:
        return Parsed(turns)
    if glaive.is_dialogue(text):
        return glaive.parse_dialogue(text)
    return Parsed([], text=text)


FORMAT = Format("text", (("text",),), parse)
