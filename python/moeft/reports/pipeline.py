"""``report.md`` of a pipeline: what its models score beside each other, over all seeds, and what ran."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moeft.provenance import RunFolder
from moeft.reports.evaluation import comparison_table, estimate_text, models_section
from moeft.reports.preference import preference_section, rounds_section
from moeft.reports.text import facts, fence, number, table
from moeft.reports.trainings import training_section


def write_pipeline_report(run: RunFolder) -> Path:
    """Write ``report.md`` into the run folder of a pipeline."""
    metrics = run.read_json("metrics.json") or {}
    sections = [f"# Report of `{run.record['command']}`\n"]
    sections += [_comparison(name, found) for name, found in metrics.get("comparisons", {}).items()]
    sections += [training_section(metrics.get("trainings", []))] if metrics.get("trainings") else []
    sections += [section for name, found in metrics.get("evaluations", {}).items() for section in _each(name, found)]
    if notes := metrics.get("notes"):
        lines = [f"- {name}: {line}\n" for name, said in notes.items() for line in said]
        sections.append("## What stages found\n\n" + "".join(lines))
    sections += [preference_section(name, found) for name, found in metrics.get("preferences", {}).items()]
    sections += [rounds_section(name, found) for name, found in metrics.get("rounds", {}).items()]
    finished = [event for event in run.events("stage") if event["status"] == "finished"]
    sections.append("## Stages\n\n" + table(["stage", "seconds"], [[e["name"], e["seconds"]] for e in finished]))
    record = run.record
    sections.append(
        "## What ran\n\n"
        + facts(
            [
                ("started", record["started_at"]),
                ("finished", record.get("finished_at")),
                ("starts", record["attempts"]),
                ("commit", record.get("commit")),
                ("processor", f"{record['hardware']['cpu']}, {number(record['hardware']['cores'])} cores"),
                ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
            ]
        )
    )
    recipe = yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True)
    sections.append("## Recipe\n\n" + fence(recipe, "yaml"))
    path = run.path / "report.md"
    path.write_text("\n".join(sections), encoding="utf-8")
    return path


def _each(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """An evaluation for each seed of the pipeline."""
    return [models_section(name if of["seed"] is None else f"{name}, seed {of['seed']}", of) for of in found]


def _comparison(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    models = list(found[0]["models"])
    figures = list(found[0]["models"][models[0]])
    rows = [[model, *(_cell(found, model, figure) for figure in figures)] for model in models]
    note = ""
    if len(found) > 1:
        seeds = ", ".join(str(seed["seed"]) for seed in found)
        note = f"\nMean, smallest and largest of {len(found)} seeds ({seeds}).\n"
    return f"## {name}\n\n" + table(["model", *figures], rows) + note + "".join(_against_first(found))


def _against_first(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each model but the first, of every seed: what changed, item by item."""
    for seed in found:
        title = "" if seed["seed"] is None else f", seed {seed['seed']}"
        first = next(iter(seed["models"]))
        for model, rows in seed.get("against_first", {}).items():
            yield f"\n### {first} and {model}{title}\n\n" + comparison_table(rows, first, model, 0.95)


def _cell(found: Sequence[Mapping[str, Any]], model: str, figure: str) -> str:
    """Mean and range over seeds; of one seed the value with its interval."""
    if len(found) > 1 or "intervals" not in found[0]:
        return _spread([seed["models"][model][figure] for seed in found])
    return estimate_text(found[0]["intervals"][model][figure])


def _spread(values: Sequence[float]) -> str:
    mean = number(float(statistics.fmean(values)))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ({number(float(min(values)))} to {number(float(max(values)))})"
