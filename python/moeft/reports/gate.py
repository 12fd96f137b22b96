"""The section of a report about the capability gate."""

from collections.abc import Mapping
from typing import Any

from moeft.provenance import RunFolder
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
    cost = "" if summary is None else f"\n{number(summary['seconds'])} s, {percent(summary['share'])} of training.\n"
    return text + ("\n" + "".join(breaches) if breaches else "") + cost + "\n![Capabilities over steps](gate.png)\n"


def _reading(event: Mapping[str, Any], name: str) -> str | None:
    found = next((reading for reading in event["readings"] if reading["name"] == name), None)
    if found is None:
        return None
    if found["low"] is None:
        return number(found["value"])
    return f"{number(found['value'])} ({number(found['low'])} to {number(found['high'])})"
