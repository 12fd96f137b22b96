"""Dialogue rows to scenes in a tool protocol: a stage of pipelines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeft.config.stages import ScenesRecipe
from moeft.data.reading import read_rows
from moeft.data.rejects import Reject, summary, write_rejects
from moeft.data.rows import Message
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError, RecipeError
from moeft.provenance import RunFolder
from moeft.tool_protocols import protocol
from moeft.tool_protocols.scenes import PROSE, TOOLS, as_scene

TRAIN, HELDOUT, PROMPTS = "train.jsonl", "heldout.jsonl", "prompts.jsonl"


def check(recipe: ScenesRecipe) -> None:
    """Refuse what no row could mend.

    Raises:
        RecipeError: If the prose is not that of the tools.
    """
    if recipe.tools is None and set(recipe.prose) - set(PROSE):
        raise RecipeError(f"prose is {', '.join(recipe.prose)}, but the tools are say and choose; give tools: FILE")


def run(recipe: ScenesRecipe, out: Path, show: Callable[[str], None] = print) -> RunFolder:
    """Convert, filter and cut.

    A row is left out if a reply of it is invalid, if its opening was seen before, or, of the rows to train on, if it
    opens as a held-out one does.

    Args:
        recipe: Rows and protocol.
        out: Run folder: ``train.jsonl``, ``heldout.jsonl``, ``prompts.jsonl`` (openings of the held-out rows, for the
            task ``scenes``), ``rejects.jsonl``, ``metrics.json``.
        show: Where to print.

    Raises:
        DataError: If a file cannot be read, or too few rows are valid.
    """
    check(recipe)
    inputs = {str(path): path for path in recipe.rows}
    if recipe.tools is not None:
        inputs["tools"] = recipe.tools
    with RunFolder.create(out, "scenes", recipe.resolved(), inputs, recipe.seed) as folder:
        schemas = ToolSchemas(TOOLS) if recipe.tools is None else ToolSchemas.read(recipe.tools)
        scenes, rejects = _scenes(recipe, schemas)
        if len(scenes) <= recipe.heldout:
            reasons = "; ".join(summary(rejects)) or "there are no others"
            raise DataError(
                f"{len(scenes)} rows are valid scenes, expected more than the {recipe.heldout} to hold out: {reasons}"
            )
        random.Random(recipe.seed).shuffle(scenes)
        heldout, train = scenes[: recipe.heldout], scenes[recipe.heldout :]
        _write(folder.path / TRAIN, ({"messages": scene} for scene in train))
        _write(folder.path / HELDOUT, ({"messages": scene} for scene in heldout))
        _write(folder.path / PROMPTS, (_prompt(scene, recipe, schemas) for scene in heldout))
        write_rejects(rejects, folder.path / "rejects.jsonl")
        counts = {"train": len(train), "heldout": len(heldout), "left_out": len(rejects)}
        note = f"{len(scenes)} valid scenes, {len(heldout)} of them held out; {len(rejects)} rows left out"
        folder.write_json("metrics.json", {**counts, "notes": [note, *summary(rejects)]})
        show(note)
    return folder


def _scenes(recipe: ScenesRecipe, schemas: ToolSchemas) -> tuple[list[list[Message]], list[Reject]]:
    """Valid scenes, no two of the same opening."""
    scenes: dict[str, list[Message]] = {}
    rejects: list[Reject] = []
    spoken = protocol(recipe.protocol)
    system: list[Message] = [] if recipe.system is None else [{"role": "system", "content": recipe.system}]
    for path in recipe.rows:
        rows = read_rows(path, turns="trim")
        rejects += rows.rejects
        for row in rows.rows:
            turns = [message for message in row.messages if not (system and message["role"] == "system")]
            try:
                scene = as_scene(turns, spoken, schemas, recipe.narrator)
            except DataError as error:
                rejects.append(Reject(row.line, str(error), rows.source))
                continue
            opening = _opening(scene)
            if opening in scenes:
                rejects.append(Reject(row.line, "opens as an earlier row does", rows.source))
            else:
                scenes[opening] = [*system, *scene]
    return list(scenes.values()), rejects


def _opening(scene: Sequence[Message]) -> str:
    """The user's first turn, as words."""
    said = next((message["content"] for message in scene if message["role"] == "user"), "")
    return " ".join(said.casefold().split())


def _prompt(scene: Sequence[Message], recipe: ScenesRecipe, schemas: ToolSchemas) -> Mapping[str, Any]:
    first = next(place for place, message in enumerate(scene) if message["role"] == "assistant")
    return {
        "messages": scene[:first],
        "protocol": recipe.protocol,
        "prose": list(recipe.prose),
        "tools": schemas.tools,
    }


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
