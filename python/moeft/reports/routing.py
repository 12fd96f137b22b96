"""The section of a report about how training moved the routers."""

from collections.abc import Mapping
from typing import Any

from moeft.reports.text import number, percent, table


def routing_section(drift: Mapping[str, Any] | None) -> str:
    """A table of all layers; empty for a run that did not compare them."""
    if not drift:
        return ""
    rows = [
        [
            layer["layer"],
            percent(layer["agreement"]),
            percent(layer["same_first"]),
            percent(layer["load_shift"]),
            layer["busiest_before"],
            layer["busiest_after"],
        ]
        for layer in drift["layers"]
    ]
    mean = ["**mean**", *(percent(drift[name]) for name in ("agreement", "same_first", "load_shift")), None, None]
    header = ["layer", "same experts", "same first", "load shifted", "busiest over mean, before", "after"]
    return f"## Routing of {number(drift['tokens'])} tokens, before and after\n\n" + table(header, [*rows, mean])
