"""Which rows a recipe leaves out although they can be read."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from moeft.config.recipe import Section, one_or_many


class Length(Section):
    """Bounds of a row: its turns, and the characters and tokens of their contents, without the chat template."""

    min_turns: int | None = Field(default=None, ge=1, description="Fewest turns, that of the system included")
    max_turns: int | None = Field(default=None, ge=1, description="Most turns")
    min_characters: int | None = Field(default=None, ge=0, description="Fewest characters of all contents")
    max_characters: int | None = Field(default=None, ge=1, description="Most characters")
    min_tokens: int | None = Field(default=None, ge=0, description="Fewest tokens of all contents")
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens")


class NearDuplicates(Section):
    """Rows much like an earlier one, by MinHash over runs of words."""

    threshold: float = Field(default=0.8, gt=0, le=1, description="Share of common runs from which rows are alike")
    words: int = Field(default=5, ge=1, description="Words of a run")
    permutations: int = Field(default=128, ge=16, description="Length of a signature; more estimates closer")


class Language(Section):
    """Rows in these languages."""

    keep: Annotated[
        tuple[str, ...],
        BeforeValidator(one_or_many, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="ISO 639-1 codes, such as [en, de]"),
    ]
    min_characters: int = Field(default=80, ge=1, description="Shorter rows are kept, since nobody could tell")


class Contamination(Section):
    """Rows that hold a piece of an evaluation set."""

    files: Annotated[
        tuple[Path, ...],
        BeforeValidator(one_or_many, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="Files of evaluation sets; every text in their records counts"),
    ]
    words: int = Field(default=13, ge=3, description="Words in a row that have to be equal")


class Filters(Section):
    """Which rows are left out; each with its reason in the rejects."""

    length: Length | None = Field(default=None, description="Bounds in turns, characters and tokens")
    tool_calls: bool = Field(
        default=False, description="Leave out rows whose calls name no tool of the row or break its schema"
    )
    language: Language | None = Field(default=None, description="Languages to keep")
    contamination: Contamination | None = Field(default=None, description="Evaluation sets to keep out")
    duplicates: bool = Field(default=False, description="Leave out rows whose words equal those of an earlier row")
    near_duplicates: NearDuplicates | None = Field(
        default=None, description="Leave out rows much like an earlier one; {} takes the defaults"
    )

    @property
    def compare_rows(self) -> bool:
        """Whether what becomes of a row depends on earlier ones."""
        return self.duplicates or self.near_duplicates is not None
