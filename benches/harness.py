"""What all benches share: interleaved rounds, one table, one file of JSON lines, and no numbers while tests are red."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moeft import _core
from moeft.provenance.environment import describe_environment

ROOT = Path(__file__).parent.parent
SAMPLE_SECONDS = 2e-3
PEERS = ("torch", "bitsandbytes", "peft", "transformers", "moeft")


@dataclass
class Subject:
    """Something to time.

    Attributes:
        run: Does the work once.
        amount: Work of one run, in the unit of its case.
        nbytes: Bytes that it must read and write, if memory is what limits it.
        limit: Name of the subject of the same case that shows what the machine can do.
    """

    run: Callable[[], object]
    amount: float
    nbytes: float = 0
    limit: str | None = None


@dataclass
class Case:
    """Subjects that do the same, on the same inputs; they were compared before the case was made."""

    name: str
    unit: str
    subjects: dict[str, Subject]
    notes: dict[str, Any] = field(default_factory=dict)


def require_green(tests: Iterable[str]) -> None:
    """Run the tests of what is to be timed.

    Raises:
        SystemExit: If one fails: a wrong result has no speed.
    """
    files = [str(ROOT / "tests" / name) for name in tests]
    print("testing", *tests, flush=True)
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files], cwd=ROOT, check=False).returncode:
        raise SystemExit("the tests of these kernels fail: no speed is printed")


def measure(case: Case, rounds: int, threads: int, cpu_time: bool = False) -> list[dict[str, Any]]:
    """Time every subject once per round; the first round warms up and does not count.

    A subject of microseconds runs as often in a row as fills :data:`SAMPLE_SECONDS`: on its own, what the one before
    left in the caches would be timed.

    ``cpu_time`` counts what the calling thread computed, which other work on the machine disturbs less; with one
    thread that is all of the work.
    """
    now = time.thread_time if cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in case.subjects}
    repeats = dict.fromkeys(case.subjects, 1)
    for round_number in range(rounds + 1):
        for name, subject in case.subjects.items():
            start = now()
            for _ in range(repeats[name]):
                subject.run()
            elapsed = (now() - start) / repeats[name]
            if round_number:
                seconds[name].append(elapsed)
            else:
                repeats[name] = max(1, round(SAMPLE_SECONDS / max(elapsed, 1e-6)))
    results = []
    for name, subject in case.subjects.items():
        median, best = statistics.median(seconds[name]), min(seconds[name])
        result = {
            "case": case.name,
            "subject": name,
            "threads": threads,
            "clock": "thread" if cpu_time else "wall",
            "unit": case.unit,
            "median": subject.amount / median,
            "best": subject.amount / best,
            "median_seconds": median,
        }
        if subject.nbytes:
            result["gb_per_second"] = subject.nbytes / median / 1e9
        if subject.limit is not None:
            limit = case.subjects[subject.limit]
            pairs = zip(seconds[name], seconds[subject.limit], strict=True)
            result["share_of_limit"] = statistics.median(
                (subject.nbytes / ours) / (limit.nbytes / theirs) for ours, theirs in pairs
            )
        results.append(result | case.notes)
    return results


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """How far the resident memory of this process rises while ``run`` runs. Linux only."""
    status = Path("/proc/self/status")

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024


def report(results: list[dict[str, Any]], out: Path | None) -> None:
    """Print one case as a table, and append it to a file."""
    print(f"\n{results[0]['case']}, {results[0]['threads']} thread(s)")
    for result in results:
        share = f"{result['share_of_limit']:>6.0%} of limit" if "share_of_limit" in result else ""
        rate = f"{result['gb_per_second']:>7.1f} GB/s" if "gb_per_second" in result else " " * 12
        memory = f"{result['peak_extra'][result['subject']] / 1e6:>8.1f} MB extra" if "peak_extra" in result else ""
        print(
            f"  {result['subject']:<52}{result['median']:>16,.0f} {result['unit']:<12}"
            f"{result['median_seconds'] * 1e3:>9.2f} ms{rate}{share}{memory}",
            flush=True,
        )
    if out is not None:
        environment = machine()
        with out.open("a", encoding="utf-8") as file:
            for result in results:
                if "peak_extra" in result:
                    result = result | {"peak_extra": result["peak_extra"][result["subject"]]}
                file.write(json.dumps(result | environment) + "\n")


def machine() -> dict[str, Any]:
    """Processor, instruction set and versions."""
    return {
        "cpu": describe_environment()["hardware"]["cpu"],
        "isa": _core.instruction_set(),
        **{name: metadata.version(name) for name in PEERS},
    }


def set_threads(threads: int) -> None:
    """Let PyTorch, and with it our kernels, use that many threads."""
    torch.set_num_threads(threads)
