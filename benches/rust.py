"""Run the core's criterion benches, keep their medians in one file, and compare them with an earlier one.

usage: python benches/rust.py [--out FILE.json] [--against FILE.json] [--loaded] [--only NAME ...] [-- ARGUMENT ...]

Nothing fails on a slow time: the ratios are for reading. `--loaded` says in the file that other work ran beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from moeft import _core
from moeft.provenance.environment import describe_environment

ROOT = Path(__file__).parent.parent
NAMES = ("nf4", "routing", "checkpoint", "gemm", "experts", "optim")


def main() -> None:
    """Run, print a table, and write the file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write medians here")
    parser.add_argument("--against", type=Path, help="print the speed relative to this file")
    parser.add_argument("--loaded", action="store_true", help="note that the machine was busy")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("criterion", nargs="*", help="arguments of criterion, after --")
    arguments = parser.parse_args()
    earlier = medians(json.loads(arguments.against.read_text())) if arguments.against else {}

    started = time.time()
    benches = [argument for name in arguments.only for argument in ("--bench", name)]
    command = ["cargo", "bench", "--quiet", "-p", "moeft-core", *benches, "--", "--noplot", *arguments.criterion]
    subprocess.run(command, cwd=ROOT, check=True)
    results = collect(ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "criterion", started)
    for result in results:
        ratio = earlier.get(result["name"])
        compared = "" if ratio is None else f"{ratio / result['median_ns']:>8.2f} x earlier"
        print(f"{result['name']:<58}{result['median_ns']:>16,.0f} ns  {rate(result):<20}{compared}")
    if arguments.out:
        hardware = describe_environment()["hardware"]
        report = {
            "cpu": hardware["cpu"],
            "cores": hardware["cores"],
            "isa": _core.instruction_set(),
            "rustc": subprocess.check_output(["rustc", "--version"], text=True).strip(),
            "system": platform.platform(terse=True),
            "date": time.strftime("%Y-%m-%d"),
            "loaded": arguments.loaded,
            "clock": "time of the thread; wall time for routing and checkpoint",
            "results": results,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def collect(folder: Path, since: float) -> list[dict[str, Any]]:
    """Medians that criterion wrote below ``folder`` after ``since``, by name."""
    results = []
    for path in folder.rglob("new/estimates.json"):
        if path.stat().st_mtime < since:
            continue
        benchmark = json.loads((path.parent / "benchmark.json").read_text())
        median = json.loads(path.read_text())["median"]
        result = {
            "name": benchmark["full_id"],
            "median_ns": round(median["point_estimate"], 1),
            "interval_ns": [round(median["confidence_interval"][bound], 1) for bound in ("lower_bound", "upper_bound")],
        }
        for unit, amount in (benchmark["throughput"] or {}).items():
            unit = unit.removesuffix("Decimal").lower()
            result[f"{unit}_per_second"] = round(amount / median["point_estimate"] * 1e9)
        results.append(result)
    return sorted(results, key=lambda result: result["name"])


def medians(report: dict[str, Any]) -> dict[str, float]:
    """Median of each bench of a file, in nanoseconds."""
    return {result["name"]: result["median_ns"] for result in report["results"]}


def rate(result: dict[str, Any]) -> str:
    """Throughput to be read."""
    for unit in ("elements", "bytes"):
        if amount := result.get(f"{unit}_per_second"):
            return f"{amount / 1e9:,.3f} G{unit}/s"
    return ""


if __name__ == "__main__":
    main()
