"""The section of a pipeline's report about its stages that train: gate, routers, cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeft.reports.text import percent, table


def training_section(trainings: Sequence[Mapping[str, Any]]) -> str:
    """A row for every run, with a link to its report if there is one."""
    rows = [
        [
            run["stage"] if run["report"] is None else f"[{run['stage']}]({run['report']})",
            run["steps"],
            run["tokens"],
            run["seconds"],
            run["learning_rate"],
            _outcome(run["gate"]),
            None if run["gate"] is None else percent(run["gate"]["share"]),
            percent(run["routing"].get("agreement")),
            percent(run["routing"].get("load_shift")),
        ]
        for run in trainings
    ]
    header = ["run", "steps", "tokens", "seconds", "rate found", "gate", "its cost", "same experts", "load shifted"]
    return "## Training\n\n" + table(header, rows)


def _outcome(gate: Mapping[str, Any] | None) -> str | None:
    if gate is None:
        return None
    stopped = gate["stopped"]
    if stopped is None:
        return "kept every bound"
    back = stopped["rolled_back_to"]
    return f"stopped at step {stopped['step']}" + ("" if back is None else f", went back to step {back}")
