"""Kinds of stages of a pipeline: how each reads its recipe, runs, and knows that it ran."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from moeft.config import Recipe, SftRecipe
from moeft.config.dpo import DpoRecipe
from moeft.config.iterate import IterateRecipe
from moeft.config.pipeline import Step
from moeft.config.stages import (
    CompareRecipe,
    EvaluateRecipe,
    ExportRecipe,
    FisherRecipe,
    HardPairsRecipe,
    LayoutRecipe,
    QuantizeRecipe,
    ScenesRecipe,
    SubspaceRecipe,
)
from moeft.errors import RecipeError
from moeft.hard.targets import Targets
from moeft.planning.sizes import parse_bytes
from moeft.provenance import is_finished
from moeft.provenance.files import read_json
from moeft.runs import compare, dpo, evaluations, export, fisher, iterate, layout, preflight, scenes, sft, subspace
from moeft.runs.hard import BuildSettings, Toolbox, build_pairs
from moeft.runs.results import show_results

Show = Callable[[str], None]
SUBSPACE = "subspace.safetensors"
PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class Kind:
    """A command as a stage.

    Attributes:
        read: Its recipe, checked as far as it can be before earlier stages have run.
        run: Runs it, or continues it where it was.
        is_done: Whether an earlier start finished it.
        check: Finds what running it would find late, and needs nothing that earlier stages make.
        dry_run: Does what comes before training and leaves nothing, once all that it reads is there.
        notes: File in which it leaves lines for the report, as ``notes``.
    """

    read: Callable[[Step], Any]
    run: Callable[[Any, Path, Show], object]
    is_done: Callable[[Path], bool]
    check: Callable[[Any], None] | None = None
    dry_run: Callable[[Any, Show], None] | None = None
    notes: Callable[[Path], Path] | None = None


def read(step: Step) -> Any:
    """The recipe of a step.

    Raises:
        RecipeError: If there is no such kind, or the recipe cannot be used.
    """
    kind = KINDS.get(step.kind)
    if kind is None:
        raise RecipeError(f"stages.{step.name} is {step.kind!r}, expected one of: {', '.join(KINDS)}")
    return kind.read(step)


def inputs(value: Any) -> Iterator[Path]:
    """Every path of a stage's recipe that it reads."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name, item in value:
            if name not in ("output", "cache_dir", "cache"):
                yield from inputs(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from inputs(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from inputs(item)


def notes(step: Step) -> list[str]:
    """What a stage that ran says about its result, for the report."""
    file = KINDS[step.kind].notes
    said: list[str] = [] if file is None else read_json(file(step.folder))["notes"]
    return said


def _as(recipe: type[Recipe]) -> Callable[[Step], Recipe]:
    return lambda step: recipe.from_content(step.content, f"stages.{step.name}", step.start)


def _as_run(recipe: type[Recipe]) -> Callable[[Step], Recipe]:
    """Reads the recipe of a command that has a run folder, which is that of the stage."""

    def read(step: Step) -> Recipe:
        if "output" in step.content:
            raise RecipeError(
                f"stages.{step.name}: output is given, but a stage writes to a folder of its name; remove it"
            )
        content = {**step.content, "output": str(step.folder)}
        return recipe.from_content(content, f"stages.{step.name}", step.start)

    return read


def _read_merge(step: Step) -> dict[str, Any]:
    from moeft import _core

    _core.check_merge(json.dumps(step.content), step.start)
    content = dict(step.content)
    for key in content.keys() & {"base_model", "fisher", "layer_importance"}:
        content[key] = step.start / content[key]
    content["models"] = [
        {key: item if key == "parameters" else step.start / item for key, item in model.items()}
        for model in content["models"]
    ]
    return content


def _run_sft(recipe: SftRecipe, out: Path, show: Show) -> None:
    show_results(sft.run(recipe, show), show)


def _run_dpo(recipe: DpoRecipe, out: Path, show: Show) -> None:
    show_results(dpo.run(recipe, show), show)


def _run_iterate(recipe: IterateRecipe, out: Path, show: Show) -> None:
    iterate.run(recipe, show)


def _run_hard_pairs(recipe: HardPairsRecipe, out: Path, show: Show) -> None:
    build_pairs(
        Toolbox.read(recipe.tools, recipe.protocol),
        recipe.seeds,
        out / PAIRS,
        BuildSettings(recipe.count, recipe.share, recipe.reasoned_every, recipe.augment, recipe.seed),
        exclude=recipe.exclude,
        easy=recipe.easy,
        targets=None if recipe.targets is None else Targets.read(recipe.targets),
        show=show,
    )


def _check_fisher(recipe: FisherRecipe) -> None:
    try:
        parse_bytes(recipe.memory)
    except ValueError as error:
        raise RecipeError(f"memory: {error}") from error


def _run_fisher(recipe: FisherRecipe, out: Path, show: Show) -> None:
    options = {name: value for name, value in recipe if name not in ("memory", "device")}
    fisher.run(fisher.FisherSettings(**options), out, parse_bytes(recipe.memory), recipe.device, show)


def _run_subspace(recipe: SubspaceRecipe, out: Path, show: Show) -> None:
    out.mkdir(parents=True, exist_ok=True)
    show(str(subspace.run(out=out / SUBSPACE, **dict(recipe))))


def _run_quantize(recipe: QuantizeRecipe, out: Path, show: Show) -> None:
    from moeft import checkpoint

    options = {name: value for name, value in recipe if name != "model"}
    show(str(checkpoint.quantize(recipe.model, out, progress=True, **options)))


def _run_merge(recipe: dict[str, Any], out: Path, show: Show) -> None:
    from moeft.merging import merge

    out.parent.mkdir(parents=True, exist_ok=True)
    show(str(merge(recipe, out)))


def _is_checkpoint(out: Path) -> bool:
    # Such a folder appears when it is complete.
    return (out / "config.json").is_file()


def _metrics(out: Path) -> Path:
    return out / "metrics.json"


KINDS = {
    "sft": Kind(_as_run(SftRecipe), _run_sft, is_finished, preflight.check, sft.dry_run),
    "hard-pairs": Kind(_as(HardPairsRecipe), _run_hard_pairs, lambda out: (out / PAIRS).is_file()),
    "dpo": Kind(_as_run(DpoRecipe), _run_dpo, is_finished, preflight.check, dpo.dry_run),
    "hard-rounds": Kind(_as_run(IterateRecipe), _run_iterate, is_finished, iterate.check),
    "fisher": Kind(_as(FisherRecipe), _run_fisher, is_finished, _check_fisher),
    "subspace": Kind(_as(SubspaceRecipe), _run_subspace, lambda out: (out / SUBSPACE).is_file()),
    "quantize": Kind(_as(QuantizeRecipe), _run_quantize, _is_checkpoint),
    "merge": Kind(_read_merge, _run_merge, _is_checkpoint),
    "scenes": Kind(_as(ScenesRecipe), scenes.run, is_finished, scenes.check, notes=_metrics),
    "layout": Kind(_as(LayoutRecipe), layout.run, layout.is_done, notes=layout.report_file),
    "export": Kind(_as(ExportRecipe), export.run, is_finished, export.check, notes=_metrics),
    "evaluate": Kind(_as(EvaluateRecipe), evaluations.run, is_finished, evaluations.check),
    "compare": Kind(_as(CompareRecipe), compare.run, is_finished),
}
