"""YAML text and ``key=value`` overrides into plain dicts, lists and scalars.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: ``1e-4`` is a number, ``no`` and ``on`` are words, a date
stays text. A key given twice is an error instead of a silent choice.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from moeft.errors import RecipeError

Location = tuple[str | int, ...]
"""Keys and list positions from the top of a document down to one value."""


class _CoreSchemaLoader(yaml.SafeLoader):
    """SafeLoader with the scalar types of YAML 1.2 and without repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML looks it up on the class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # PyYAML's own takes a leading zero for octal.


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _CoreSchemaLoader.construct_yaml_int)


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        OSError: If the file cannot be read.
        RecipeError: If it is not UTF-8, not YAML, or not a mapping; with file, line and column.
    """
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}{_position(error)} is not valid YAML: {_reason(error)}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path} holds {_kind(document)}, expected a mapping of keys to values")
    return document


def parse(text: str) -> Any:
    """Parse YAML text with the scalar types of YAML 1.2; raises ``yaml.YAMLError``."""
    return yaml.load(text, Loader=_CoreSchemaLoader)


def apply_override(document: dict[str, Any], override: str) -> Location:
    """Set one value of a document in place.

    Args:
        document: Nested dicts; changed in place. Missing or null parents become mappings.
        override: ``dotted.path=value``; the value is YAML.

    Returns:
        Location of the value that was set.

    Raises:
        RecipeError: If the text is not ``key=value``, the value is not YAML, or a parent is not a mapping.
    """
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"override {override!r} is not key=value, such as training.learning_rate=1e-4")
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of override {override!r} is not valid YAML: {_reason(error)}") from error
    parent = document
    for depth, key in enumerate(keys[:-1], start=1):
        if parent.get(key) is None:
            parent[key] = {}
        if not isinstance(parent[key], dict):
            held = ".".join(keys[:depth])
            raise RecipeError(f"override {override!r}: {held} holds {_kind(parent[key])}, which has no keys below it")
        parent = parent[key]
    parent[keys[-1]] = value
    return tuple(keys)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    return names.get(type(value), f"the value {value!r}")


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
