"""What a run ran on: package versions, the commit of moeft, processor, memory, GPUs. Imports none of them."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "triton")


def describe_environment() -> dict[str, Any]:
    """``versions``, ``commit`` and ``hardware`` of this process.

    ``commit`` is null unless the package lies in a git checkout of its own; ``-dirty`` marks uncommitted changes.
    """
    return {"versions": _versions(), "commit": _commit(), "hardware": _hardware()}


def _versions() -> dict[str, str]:
    from moeft import __version__

    found = {"moeft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    package = Path(__file__).parent
    # A virtual environment inside someone else's checkout would answer with their commit.
    if _output("git", "-C", package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _output("git", "-C", package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _hardware() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpus": _gpus(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpus() -> list[dict[str, Any]]:
    # nvidia-smi and not torch: a merge needs no torch, and importing it takes seconds.
    table = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in (table or "").splitlines()]
    # Boards that share the host's memory answer "[N/A]".
    return [
        {"name": name, "memory_mib": int(memory) if memory.isdigit() else None, "driver": driver}
        for name, memory, driver in rows
    ]


def _output(*command: str | Path) -> str | None:
    """What a command prints, or None if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
