"""Every option, recipe key and environment variable is named on a page that users read, as code."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import moeft.config
from moeft.cli import app
from moeft.config.recipe import Section

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "docs").glob("*.md") if page.name not in ("log.md", "architecture.md")]
# Fenced and indented blocks, and spans.
CODE = re.compile(r"```.*?```|^ {4}[^\n]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def code(page: Path) -> str:
    return "\n".join(CODE.findall(page.read_text("utf-8")))


def names(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def commands(command: Any, words: tuple[str, ...] = ("moeft",)) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield " ".join(words), command
        return
    for name, below in command.commands.items():
        yield from commands(below, (*words, name))


def sections(above: type[Section] = Section) -> Iterator[type[Section]]:
    for section in above.__subclasses__():
        yield section
        yield from sections(section)


COMMANDS = dict(commands(typer.main.get_command(app)))
for _module in pkgutil.iter_modules(moeft.config.__path__, "moeft.config."):
    importlib.import_module(_module.name)
# Other tests have sections of their own.
FOUND = {f"{section.__module__}.{section.__name__}": section for section in sections()}
SECTIONS = {name: section for name, section in FOUND.items() if name.startswith("moeft.config.")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named_on_a_page_of_its_command(name):
    text = "\n".join(found for page in [*PAGES, ROOT / "README.md"] if names(found := code(page), name))
    options = [parameter.opts for parameter in COMMANDS[name].params if parameter.param_type_name == "option"]
    missing = [spellings for spellings in options if not any(names(text, word) for word in spellings)]
    assert not missing, f"no page with `{name}` names {missing}"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_a_recipe_is_named(name):
    text = "\n".join(map(code, PAGES))
    missing = [key for key in SECTIONS[name].model_fields if not names(text, key)]
    assert not missing, f"no page names {missing}"


def test_every_environment_variable_is_named():
    folders = (ROOT / "python", ROOT / "rust" / "moeft-core" / "src", ROOT / "tests")
    files = [file for folder in folders for ending in ("py", "rs") for file in folder.rglob(f"*.{ending}")]
    read = {name for file in files for name in re.findall(r'"(MOEFT_[A-Z_]+)"', file.read_text("utf-8"))}
    text = "\n".join(map(code, [*PAGES, ROOT / "CONTRIBUTING.md"]))
    assert len(read) > 4
    assert not [name for name in read if not names(text, name)]
