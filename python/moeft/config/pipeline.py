"""The recipe of ``moeft run``: named stages, each with the recipe of a command, run in order.

A stage may name what earlier ones made: ``${name}`` is the folder of a stage, ``${seed}`` the seed at hand. With
``seeds``, stages that depend on the seed, directly or by what they read, run once for each; the others run once.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from moeft.config import document
from moeft.config.recipe import Recipe
from moeft.errors import RecipeError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_SEED = "seed"
_SEED_FOLDER = re.compile(r"seed-\d+")


class PipelineRecipe(Recipe):
    """Everything that ``moeft run`` needs to know."""

    output: Path = Field(description="Run folder; a second start with the same recipe continues it")
    folder: Path = Field(default=Path("."), description="Where relative paths of stages start: the folder of this file")
    seeds: tuple[int, ...] = Field(default=(), description="Values of ${seed}; stages that use it run once for each")
    stages: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Stages in order, `name: {kind: recipe}`, or `name: {kind: {recipe: FILE, set: {key: value}}}`",
    )

    @field_validator("seeds", mode="after")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or any(seed < 0 for seed in value):
            raise ValueError("different numbers from 0 on")
        return value

    @field_validator("stages", mode="after")
    @classmethod
    def _stages_have_names_and_kinds(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, stage in value.items():
            if not _NAME.fullmatch(name) or name == _SEED:
                raise ValueError(f"names of small letters, digits, - and _ other than seed, not {name!r}")
            if _SEED_FOLDER.fullmatch(name):
                raise ValueError(f"another name than {name}, which is that of the folder for a seed")
            if len(stage) != 1 or not isinstance(next(iter(stage.values())), dict):
                raise ValueError(f"one kind with its recipe in {name}, such as merge: {{...}}")
        return value


@dataclass(frozen=True)
class Step:
    """A stage for one seed.

    Attributes:
        name: Name of the stage.
        kind: Command that it runs.
        seed: The seed; None for a stage that is the same for all.
        content: Its recipe, with references replaced.
        folder: What it writes.
        start: Where relative paths in the recipe start.
        file: File of the recipe; None if it stands in that of the pipeline.
    """

    name: str
    kind: str
    seed: int | None
    content: dict[str, Any]
    folder: Path
    start: Path
    file: Path | None = None

    @property
    def title(self) -> str:
        """Name for messages."""
        return self.name if self.seed is None else f"{self.name} of seed {self.seed}"


def steps(recipe: PipelineRecipe) -> list[Step]:
    """The stages in the order in which they run, references replaced.

    Raises:
        RecipeError: If a stage refers to one that is not above it, or to a seed where there are none.
        OSError: If the recipe file of a stage cannot be read.
    """
    seeded: dict[str, bool] = {}
    stages = []
    for name, stage in recipe.stages.items():
        kind, written = next(iter(stage.items()))
        content, file = _content(written, recipe.folder)
        found = set(_references(content))
        if unknown := found - {_SEED, name} - seeded.keys():
            known = ", ".join([_SEED, *seeded])
            raise RecipeError(f"stages.{name} refers to ${{{unknown.pop()}}}, expected what stands above it: {known}")
        if _SEED in found and not recipe.seeds:
            raise RecipeError(f"stages.{name} refers to ${{seed}}, but the recipe has no seeds; add seeds: [0]")
        seeded[name] = any(other == _SEED or seeded.get(other, False) for other in found)
        stages.append((name, kind, content, file))
    made = [_step(recipe, seeded, stage, None) for stage in stages if not seeded[stage[0]]]
    # Every stage reads only those above it, and what depends on no seed reads nothing that does.
    return made + [_step(recipe, seeded, stage, seed) for seed in recipe.seeds for stage in stages if seeded[stage[0]]]


_Written = tuple[str, str, dict[str, Any], Path | None]  # name, kind, content and file of a stage


def _step(recipe: PipelineRecipe, seeded: Mapping[str, bool], stage: _Written, seed: int | None) -> Step:
    name, kind, content, file = stage
    start = recipe.folder if file is None else file.parent
    folders = {other: _folder(recipe, other, seed if is_seeded else None) for other, is_seeded in seeded.items()}
    values = {other: str(folder) for other, folder in folders.items()} | {_SEED: seed}
    return Step(name, kind, seed, _replace(content, values), folders[name], start, file)


def _folder(recipe: PipelineRecipe, name: str, seed: int | None) -> Path:
    return recipe.output / name if seed is None else recipe.output / f"seed-{seed}" / name


def _content(written: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path | None]:
    """What a stage says: its recipe, or that of a file with some values replaced; and that file."""
    if not isinstance(written.get("recipe"), str) or written.keys() - {"recipe", "set"}:
        return written, None
    path = folder / written["recipe"]
    content = document.read(path)
    for key, value in (written.get("set") or {}).items():
        parent = content
        *above, last = key.split(".")
        for part in above:
            parent = parent.setdefault(part, {})
            if not isinstance(parent, dict):
                raise RecipeError(f"{key} of {path}: {part} holds no keys")
        parent[last] = value
    return content, path


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _references(key)
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _replace(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        alone = _REFERENCE.fullmatch(value)
        if alone:
            return values[alone[1]]
        return _REFERENCE.sub(lambda found: str(values[found[1]]), value)
    if isinstance(value, Mapping):
        return {_replace(key, values): _replace(item, values) for key, item in value.items()}
    return [_replace(item, values) for item in value] if isinstance(value, list) else value
