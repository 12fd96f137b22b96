"""The section of a report about the capability gate."""

from collections.abc import Mapping
from typing import Any

from moeft.provenance import RunFolder
from moeft.reports.evaluation import FEW_NOTE, estimate_text
from moeft.reports.plots import plot_capabilities
from moeft.reports.text import cell, number, percent, table


def gate_section(run: RunFolder) -> str:
    """Table and picture of what the gate measured; empty without a gate. Writes ``gate.png`` into the run folder.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    events = run.events("gate")
    if not events:
        return ""
    names = [reading["name"] for reading in events[0]["readings"]]
    plot_capabilities(run.events("train_log"), events, names, run.path / "gate.png")
    rows = [[event["step"], event["verdict"], *(_reading(event, name) for name in names)] for event in events]
    text = "## Capability gate\n\n" + table(["step", "verdict", *names], rows)
    breaches = [f"- step {event['step']}: {cell(breach)}\n" for event in events for breach in event["breaches"]]
    summary = ((run.read_json("metrics.json") or {}).get("training") or {}).get("gate")
    few = any(reading.get("is_of_few") for event in events for reading in event["readings"])
    text += (f"\n{FEW_NOTE}\n" if few else "") + ("\n" + "".join(breaches) if breaches else "")
    return text + _cost(summary) + "\n![Capabilities over steps](gate.png)\n"


def _cost(summary: Mapping[str, Any] | None) -> str:
    if summary is None or summary["share"] is None:
        return ""
    base = f"the base, measured once, took {number(summary['base_seconds'])} s"
    return f"\n{number(summary['seconds'])} s, {percent(summary['share'])} of training; {base}.\n"


def _reading(event: Mapping[str, Any], name: str) -> str | None:
    found = next((reading for reading in event["readings"] if reading["name"] == name), None)
    if found is None:
        return None
    return estimate_text({"is_of_few": False, **found})
