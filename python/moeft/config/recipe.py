"""Base of every recipe: strict sections, loading from YAML, paths relative to the file, JSON schema."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moeft.config import document
from moeft.config.document import Location
from moeft.config.problems import describe
from moeft.errors import RecipeError


def one_or_many(value: Any) -> Any:
    """For a ``BeforeValidator``: a single value as the only item of a tuple."""
    # In JSON, where a tuple is a list, what a validator passes on has to be a tuple already.
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str | dict) else value


class Section(BaseModel):
    """A mapping inside a recipe: unknown keys refused, types not coerced, numbers finite, values read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Recipe(Section):
    """A whole recipe file. Subclasses declare its keys."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe and apply overrides.

        Args:
            path: YAML file. Relative paths in it count from its folder.
            overrides: ``dotted.path=value`` each, the value in YAML; later ones win. Relative paths in them count from
                the current folder, as everywhere on a command line.

        Returns:
            The recipe with every default filled in and every path absolute.

        Raises:
            OSError: If the file cannot be read.
            RecipeError: If it is not YAML, or with every unknown key, missing key and wrong value at once.
        """
        path = Path(path)
        content = document.read(path)
        overridden = [document.apply_override(content, override) for override in overrides]
        return cls.from_content(content, str(path), path.absolute().parent, overridden)

    @classmethod
    def from_content(
        cls, content: dict[str, Any], source: str, folder: Path, overridden: Sequence[Location] = ()
    ) -> Self:
        """A recipe from what a file holds.

        Args:
            content: Keys and values.
            source: What it is called in messages.
            folder: Where relative paths start.
            overridden: Places of values whose relative paths start at the current folder.

        Raises:
            RecipeError: With every unknown key, missing key and wrong value at once.
        """
        try:
            text = json.dumps(content)
        except (TypeError, ValueError) as error:  # An explicit tag such as !!timestamp, or an alias to its own parent.
            raise RecipeError(f"{source} holds a value that a recipe cannot: {error}") from error
        try:
            # JSON is the strict mode in which a path may be text and a tuple a list.
            recipe = cls.model_validate_json(text)
        except ValidationError as error:
            problems = describe(error, cls)
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise RecipeError("\n  ".join([f"{source} has {count}:", *problems])) from error
        return _with_absolute_paths(recipe, folder, overridden, ())

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON types: what a run folder records and a second start compares."""
        return self.model_dump(mode="json")


def json_schema(recipe: type[Recipe]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a kind of recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe.model_json_schema()}


_S = TypeVar("_S", bound=Section)


def _with_absolute_paths(section: _S, folder: Path, overridden: Sequence[Location], above: Location) -> _S:
    changes: dict[str, Any] = {}
    for name, value in section:
        location = (*above, name)
        # Overrides replace whole values, so a value comes from the command line if it, or a mapping around it, does.
        typed_in_shell = any(location[: len(set_at)] == set_at for set_at in overridden)
        base = Path.cwd() if typed_in_shell else folder
        if isinstance(value, Path):
            changes[name] = base / value.expanduser()
        elif isinstance(value, tuple):
            changes[name] = tuple(_absolute(item, base, folder, overridden, location) for item in value)
        elif isinstance(value, dict):
            changes[name] = {key: _absolute(item, base, folder, overridden, location) for key, item in value.items()}
        elif isinstance(value, Section):
            changes[name] = _with_absolute_paths(value, folder, overridden, location)
    return section.model_copy(update=changes)


def _absolute(item: Any, base: Path, folder: Path, overridden: Sequence[Location], location: Location) -> Any:
    if isinstance(item, Section):
        return _with_absolute_paths(item, folder, overridden, location)
    return base / item.expanduser() if isinstance(item, Path) else item
