"""What pydantic found wrong with a recipe, in words: YAML path, what was found, what was expected, nearest key."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moeft.config.document import Location


def describe(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence per problem, in the order of the file.

    Args:
        error: Raised while validating ``model`` from JSON.
        model: Class that was validated; its keys are the candidates for "did you mean".
    """
    return [_sentence(problem, model) for problem in error.errors(include_url=False)]


def dotted(location: Location) -> str:
    """A location as written in messages: ``data.train[0]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _sentence(problem: ErrorDetails, model: type[BaseModel]) -> str:
    location, where = problem["loc"], dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_nearest_key(location, model)}"
    if problem["type"] == "missing":
        return f"{where}: missing; it is {_description(location, model)}"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: found {problem['input']!r}, expected {expected}"


def _nearest_key(location: Location, model: type[BaseModel]) -> str:
    *parents, name = _keys(location)
    paths = list(_key_paths(model))
    siblings = [path[-1] for path in paths if list(path[:-1]) == parents]
    elsewhere = [path for path in paths if path[-1] == name]
    if elsewhere:  # the very name, in another section
        return f"did you mean {' or '.join(dotted(path) for path in elsewhere)}?"
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {dotted((*location[:-1], close[0]))}?"
    return f"keys here are {', '.join(siblings)}"


def _description(location: Location, model: type[BaseModel]) -> str:
    section = model
    *parents, name = _keys(location)
    for key in parents:
        section = next(iter(_sections(section.model_fields[key].annotation)))
    text = section.model_fields[name].description or "needed"
    return (text[0].lower() + text[1:]).rstrip(".")


def _keys(location: Location) -> list[str]:
    """A location without its positions in lists, whose items all have the same keys."""
    return [part for part in location if isinstance(part, str)]


def _key_paths(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        for section in _sections(field.annotation):
            yield from _key_paths(section, (*above, name))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Models that a field may hold: the field's type itself, or members of ``Model | None``."""
    return [
        kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
