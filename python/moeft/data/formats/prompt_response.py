"""One request and one answer under any of the pairs of keys that data sets use for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeft.data.formats.format import Format, Parsed, kind
from moeft.data.formats.sharegpt import with_system
from moeft.errors import DataError

if TYPE_CHECKING:
    from moeft.data.rows import Message

PAIRS = tuple(
    (request, answer)
    for request in ("prompt", "question", "query", "instruction", "problem", "input")
    for answer in ("response", "answer", "output", "solution")
)
"""Keys of the request and of the answer; the first pair of which a row has both counts."""


def parse(record: Mapping[str, Any]) -> Parsed:
    """Read a request and an answer; ``system`` or ``system_prompt`` stands for a first turn.

    Raises:
        DataError: If a value is no text, or there is no such pair.
    """
    for request, answer in PAIRS:
        if record.get(request) is not None and record.get(answer) is not None:
            break
    else:
        raise DataError("the row has no pair of keys such as prompt and response, or question and answer")
    messages: list[Message] = []
    for key, role in ((request, "user"), (answer, "assistant")):
        if not isinstance(record[key], str):
            raise DataError(f"{key} is {kind(record[key])}, expected a string")
        messages.append({"role": role, "content": record[key]})
    return Parsed(with_system(record.get("system") or record.get("system_prompt"), messages))


FORMAT = Format("prompt_response", PAIRS, parse)
