"""``report.md`` of a pipeline: what its models score beside each other, over all seeds, and what ran."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moeft.provenance import RunFolder
from moeft.reports.preference import preference_section, rounds_section
from moeft.reports.text import facts, fence, number, table


def write_pipeline_report(run: RunFolder) -> Path:
    """Write ``report.md`` into the run folder of a pipeline."""
    metrics = run.read_json("metrics.json") or {}
    sections = [f"# Report of `{run.record['command']}`\n"]
    sections += [_comparison(name, found) for name, found in metrics.get("comparisons", {}).items()]
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


def _comparison(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    models = list(found[0]["models"])
    figures = list(found[0]["models"][models[0]])
    rows = [
        [model, *(_spread([seed["models"][model][figure] for seed in found]) for figure in figures)] for model in models
    ]
    note = ""
    if len(found) > 1:
        seeds = ", ".join(str(seed["seed"]) for seed in found)
        note = f"\nMean, smallest and largest of {len(found)} seeds ({seeds}).\n"
    return f"## {name}\n\n" + table(["model", *figures], rows) + note


def _spread(values: Sequence[float]) -> str:
    mean = number(float(statistics.fmean(values)))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ({number(float(min(values)))} to {number(float(max(values)))})"
