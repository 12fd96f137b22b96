"""What a task asks of a model, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from moeft.provenance.files import to_json

Answer = dict[str, Any]
"""Plain JSON: ``log_probs`` of choices, ``log_prob`` and ``tokens`` of a text, ``reply`` of a chat (and ``tool_calls``,
where a server parses them), or ``error``, the reason why there is none."""


@dataclass(frozen=True)
class Choices:
    """The log-probability of each continuation of a text."""

    context: str
    continuations: tuple[str, ...]
    """Each with the space that separates it from the context."""


@dataclass(frozen=True)
class Text:
    """The log-probability of a whole text."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A reply to messages."""

    messages: tuple[Mapping[str, Any], ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    seed: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that may be called, as in chat templates and APIs."""


Request = Choices | Text | Chat


def request_json(request: Request) -> dict[str, Any]:
    """All that the answer depends on besides the subject, as plain JSON."""
    return {"kind": type(request).__name__, **to_json(asdict(request))}


class Subject(Protocol):
    """Whoever answers: a model in memory, or a server."""

    @property
    def identity(self) -> dict[str, Any]:
        """What its answers depend on, as plain JSON: answers of equal subjects are exchanged through caches."""

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield the index of each request and its answer, in any order, as they come.

        Raises:
            DataError: If the subject cannot answer requests of this kind at all.
        """
