"""Choices between launches of a kernel, measured once on a GPU and kept on disk under its name."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

VARIABLE = "MOEFT_CACHE"
Choice = TypeVar("Choice", bound=tuple)

_logger = logging.getLogger(__name__)
_known: dict[tuple[torch.device, str], Any] = {}  # a layer asks a dozen times, and a file's name takes microseconds
_tables: dict[Path, dict[str, list[Any]]] = {}
_forced: dict[str, tuple] = {}
_asked: dict[str, Sequence[tuple]] = {}


def lookup(key: str, device: torch.device, candidates: Sequence[Choice]) -> Choice:
    """The candidate that :func:`tune` kept for a key on this device, else the first.

    An entry that is no candidate (another version wrote it) is passed over. No host synchronisation.
    """
    _asked[key] = candidates
    if key in _forced:
        return cast("Choice", _forced[key])
    if (device, key) not in _known:
        kept = _table(_file(device)).get(key) if device.type == "cuda" else None
        _known[device, key] = next((c for c in candidates if list(c) == kept), candidates[0])
    return cast("Choice", _known[device, key])


def tune(device: torch.device, run: Callable[[], object], repeats: int = 5) -> dict[str, dict[tuple, float]]:
    """Time a function with every candidate of every choice that it meets, and keep the fastest on disk.

    Compiles and waits for the device: for benches and first starts, not for training steps. A candidate that the device
    cannot launch is left out.

    Args:
        device: A GPU.
        run: Something that launches kernels, such as a layer forward and backward.
        repeats: Runs of which the median counts.

    Returns:
        Seconds of ``run`` by choice and candidate.
    """
    _asked.clear()
    run()
    measured: dict[str, dict[tuple, float]] = {}
    try:
        for key, candidates in list(_asked.items()):
            seconds = {}
            for candidate in candidates:
                _forced[key] = candidate
                time = _seconds(run, device, repeats)
                if time is not None:
                    seconds[candidate] = time
            _forced[key] = min(seconds, key=lambda c: seconds[c], default=candidates[0])
            measured[key] = seconds
        chosen = {key: list(_forced[key]) for key in measured}
    finally:
        _forced.clear()
        _known.clear()
    file = _file(device)
    _tables[file] = {**_table(file), **chosen}
    _write(file, _tables[file])
    return measured


def cache_folder() -> Path:
    """``MOEFT_CACHE``, else ``moeft`` in the user's cache folder."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeft"


def _file(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache_folder() / "tuning" / f"{name}.json"


def _table(file: Path) -> dict[str, list[Any]]:
    if file not in _tables:
        _tables[file] = _read(file)
    return _tables[file]


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be read (%s); defaults are used, delete it to measure again", file, error)
        return {}
    return table if isinstance(table, dict) else {}


def _write(file: Path, table: dict[str, list[Any]]) -> None:
    """Replace the file at once, so that two processes never leave half a file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
            json.dump(table, part, indent=0, sort_keys=True)
        os.replace(part.name, file)
    except OSError as error:
        _logger.warning("%s cannot be written (%s); the choice is kept for this process", file, error)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float | None:
    try:
        run()
    except Exception as error:
        # Triton's own class, by name: this file is loaded where triton is missing.
        if type(error).__name__ != "OutOfResources":
            raise
        return None
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        run()
        stop.record(torch.cuda.current_stream(device))
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeats // 2]
