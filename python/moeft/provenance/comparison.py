"""What a second start of a run is compared with, and how the two differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft.provenance import files
from moeft.provenance.fingerprint import fingerprint


def asked(
    command: str, recipe: Mapping[str, Any], inputs: Mapping[str, Path], seed: int | None, processes: int = 1
) -> dict[str, Any]:
    """What a run was asked to do, as its record keeps it."""
    return {
        "command": command,
        "recipe": files.to_json(recipe),
        "seed": seed,
        "processes": processes,
        "inputs": {name: fingerprint(Path(source)) for name, source in inputs.items()},
    }


def run_differences(record: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What has to be equal for a run to continue and is not. Of an input counts what it holds, not where it lies."""
    before, now = (
        {
            "command": run["command"],
            "seed": run.get("seed"),
            "processes": run.get("processes", 1),
            "inputs": {name: {"sha256": source["sha256"]} for name, source in run["inputs"].items()},
        }
        for run in (record, asked)
    )
    return differences(record["recipe"], asked["recipe"]) + differences(before, now)


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """One line per value that differs, with its dotted key."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [*before, *(name for name in now if name not in before)]
        return [
            line for name in names for line in differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if before == now else [f"{key} was {before!r}, is now {now!r}"]
