"""What a gate watches if a recipe names nothing: small files in the package. SOURCES.md says where they come from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from moeft.evaluation.sources import Record, read_rows

FOLDER = Path(str(resources.files(__package__)))
HELLASWAG = FOLDER / "hellaswag.jsonl"
TEXTS = FOLDER / "texts.jsonl"
IFEVAL_SHORT = FOLDER / "ifeval_short.jsonl"
PROMPTS = FOLDER / "prompts.jsonl"


def prompts() -> list[str]:
    """General requests, to which a model's replies show how far it has moved."""
    return [row["prompt"] for _, row in read_rows("prompts", PROMPTS, None)]


def ifeval_short() -> list[Record]:
    """Prompts of IFEval whose instructions can be checked on the beginning of a reply."""
    return read_rows("ifeval_short", IFEVAL_SHORT, None)
