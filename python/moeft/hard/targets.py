"""What the next pairs are to aim at, from what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeft.errors import DataError
from moeft.hard.requests import Request
from moeft.provenance import files

FLOOR = 0.05
"""Weight of what did not fail, so that nothing is forgotten."""


@dataclass(frozen=True)
class Targets:
    """Weights for the next build; empty ones weigh all alike.

    Attributes:
        categories: Category -> weight.
        tools: Right tool -> weight of the requests for it.
        confusion: Right tool -> tool that was called instead -> how often.
    """

    categories: Mapping[str, float] = field(default_factory=dict)
    tools: Mapping[str, float] = field(default_factory=dict)
    confusion: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of_request(self, request: Request) -> float:
        """Weight of a request: the largest of its tools'."""
        if not self.tools:
            return 1.0
        return max(self.tools.get(call.name, FLOOR) for call in request.calls)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Targets:
        """Read what ``write`` wrote.

        Raises:
            DataError: If it is something else.
        """
        from moeft.hard.categories import CATEGORIES

        value: Any = files.read_json(path)
        if not isinstance(value, dict) or value.keys() != {"categories", "tools", "confusion"}:
            raise DataError(f"{path} holds no targets; expected the targets.json that `moeft hard analyze` writes")
        for name, weights in (*value.items(), *_rows(value["confusion"])):
            if not isinstance(weights, dict) or (name != "confusion" and not all(map(_is_weight, weights.values()))):
                raise DataError(f"{path}: {name} holds something else than weights from 0 on by name")
        if value["categories"] and not any(value["categories"].get(name) for name in CATEGORIES):
            raise DataError(f"{path}: no category has a weight above 0; known ones are {', '.join(CATEGORIES)}")
        return cls(**value)


def _rows(confusion: Any) -> list[tuple[str, Any]]:
    return [(f"confusion.{name}", row) for name, row in confusion.items()] if isinstance(confusion, dict) else []


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
