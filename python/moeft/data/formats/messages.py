"""OpenAI's form: ``messages`` with ``role`` and ``content``, calls of tools, and ``tools``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeft.data.formats.format import Format, Parsed
from moeft.data.formats.message_list import read_turns
from moeft.data.formats.tool_calls import read_tools
from moeft.errors import DataError


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read a row of ``messages``; ``functions`` is OpenAI's older name of ``tools``.

    Raises:
        DataError: If a turn or a schema is wrong, or the answer is marked as a bad one.
    """
    if record.get("label") is False:
        # The unpaired preference rows of KTO; training on them would teach what they warn of.
        raise DataError("label is false, which marks a bad answer; leave the row out, or rename the key")
    tools = read_tools(record.get("tools") if record.get("tools") is not None else record.get("functions"))
    return Parsed(read_turns(record.get("messages"), "messages"), tools)


FORMAT = Format("messages", (("messages",),), parse)
