"""Turn the JSON lines of ``benches/gpu.py`` into the tables of ``docs/performance.md``.

usage: python benches/gpu_table.py benches/results/FILE.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30
Record = dict[str, Any]


def main() -> None:
    """Print all tables that a file has lines for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    print(tables([json.loads(line) for line in parser.parse_args().file.read_text("utf-8").splitlines()]))


def tables(records: Iterable[Record]) -> str:
    """Markdown of all sections; rates beside the limits that were measured in the same run."""
    by_section: dict[str, list[Record]] = defaultdict(list)
    problems = []
    for record in records:
        if "error" in record or "skipped" in record or record["section"] in ("stopped", "failed"):
            problems.append(record)
        else:
            by_section[record["section"]].append(record)
    limits = {record["what"]: record for record in by_section["limits"]}
    copy = limits.get("copy", {}).get("bytes_per_second")
    dense = limits.get("dense product", {}).get("flops")
    parts = [_machine(by_section["machine"]), _limits(copy, dense, by_section["bus"])]
    parts.append(_dequantize(by_section["dequantize"], copy))
    parts.append(_products(by_section["products"], dense))
    parts.append(_attention(by_section["attention"]))
    parts.append(_steps(by_section["step"]))
    parts.append(_norms(by_section["norms"], copy))
    parts.append(_launches(by_section["launches"]))
    parts.append(_profiles(by_section["profile"]))
    parts.append(_guard(by_section["guard"]))
    parts.append(_streaming(by_section["streaming"]))
    parts.append(_optimizer(by_section["optimizer"]))
    failed = [record for record in by_section["correctness"] if not record["passed"]]
    parts += [f"**wrong: {record['kernel']}, relative error {record['relative_error']:.2g}**" for record in failed]
    parts += [_problem(record) for record in problems]
    return "\n\n".join(part for part in parts if part)


def _machine(records: Sequence[Record]) -> str:
    if not records:
        return ""
    m = records[-1]
    return f"{m['gpu']}, torch {m['torch']}, Triton {m['triton']}, transformers {m['transformers']}, {m['date'][:10]}."


def _limits(copy: float | None, dense: float | None, bus: Sequence[Record]) -> str:
    found = [] if copy is None else [f"copy in memory {copy / 1e9:,.0f} GB/s"]
    found += [] if dense is None else [f"dense product {dense / 1e12:,.1f} TFLOP/s"]
    found += [f"from {r['memory']} host memory {r['bytes_per_second'] / 1e9:,.1f} GB/s" for r in bus]
    return f"Limits of the machine, measured in the same run: {', '.join(found)}." if found else ""


def _dequantize(records: Sequence[Record], copy: float | None) -> str:
    if not records or not copy:
        return ""
    best = max(records, key=lambda record: record["bytes_per_second"])
    rate = best["bytes_per_second"]
    return f"Restoring NF4 with nested statistics: {rate / 1e9:,.0f} GB/s, {rate / copy:.0%} of a copy (goal 80 %)."


def _products(records: Sequence[Record], dense: float | None) -> str:
    """The fastest tile of each path."""
    rates: dict[tuple[int, bool], dict[str, float]] = defaultdict(dict)
    for record in records:
        if "flops" in record:
            row = rates[record["tokens"], record["transpose"]]
            row[record["path"]] = max(row.get(record["path"], 0), record["flops"])
    if not rates or not dense:
        return ""
    paths = list(dict.fromkeys(path for row in rates.values() for path in row))
    rows = [
        [f"{tokens:,}", "backward" if transpose else "forward"]
        + [f"{row[p] / 1e12:,.1f} ({row[p] / dense:.0%})" if p in row else "" for p in paths]
        for (tokens, transpose), row in sorted(rates.items())
    ]
    return _table("gate/up of all experts, TFLOP/s and share of the dense rate:", ["tokens", "", *paths], rows)


def _attention(records: Sequence[Record]) -> str:
    rows = [
        [r["layer"], r["rows"], r["path"]]
        + [f"{r['milliseconds' + part]:,.2f} ({r['flops' + part] / 1e12:,.1f})" for part in ("", "_with_backward")]
        for r in records
    ]
    title = "Attention of a layer, packed rows, ms and TFLOP/s of the pairs that are needed:"
    return _table(title, ["layer", "rows", "path", "forward", "forward and backward"], rows)


def _norms(records: Sequence[Record], copy: float | None) -> str:
    if not copy:
        return ""
    rates = ("bytes_per_second", "backward_bytes_per_second")
    rows = [
        [r["what"], r["path"], *(f"{r[rate] / 1e9:,.0f} ({r[rate] / copy:.0%})" for rate in rates)] for r in records
    ]
    return _table("Norms, GB/s of rows and share of a copy:", ["rows", "path", "forward", "backward"], rows)


def _steps(records: Sequence[Record]) -> str:
    rows = [
        [
            r["setting"] + (f", cap {r['cap_gib']} GiB" if "cap_gib" in r else ""),
            r.get("policy", "full"),
            f"{r['sequences']} x {r['length']:,}",
            *_speed_and_peaks(r),
        ]
        for r in records
    ]
    head = ["model", "checkpointing", "tokens", "s/step", "tokens/s", "allocated GiB", "reserved GiB"]
    return _table("Training steps:", head, rows)


def _launches(records: Sequence[Record]) -> str:
    found = [f"{r['launches']} with {'NF4' if r['packed'] else 'bf16'} experts" for r in records]
    return f"Launches of routing and experts of a layer, forward and backward (goal 60): {', '.join(found)}." * bool(
        found
    )


def _profiles(records: Sequence[Record]) -> str:
    rows = [
        [
            r["setting"],
            f"{r['sequences']} x {r['length']:,}",
            f"{r['launches_per_layer']:.0f}",
            r.get("host_synchronisations", "not counted"),
        ]
        for r in records
        if "launches" in r
    ]
    head = ["model", "tokens", "launches per layer", "host synchronisations"]
    return _table(
        "A step, forward and backward: launches by its layers, attention and norms included, and waits for the device:",
        head,
        rows,
    )


def _guard(records: Sequence[Record]) -> str:
    rows = [
        [r["optimizer"], f"{r['seconds'] * 1e3:.2f}", r.get("host_synchronisations", "not counted")] for r in records
    ]
    values = f"{records[0]['values'] / 1e6:,.1f} M" if records else ""
    return _table(
        f"Clipping, guard and step of {values} values in float32; a bad step changed no bit:",
        ["optimizer", "ms", "host synchronisations"],
        rows,
    )


def _streaming(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        alone = r.get("resident_seconds")
        cost = f"{r['seconds'] / alone - 1:+.0%}" if alone and "seconds" in r else ""
        cap = f"{r['cap_gib']} GiB" if "cap_gib" in r else ""
        rows.append(
            [r["adapter"], r["resident"], cap, f"{r['sequences']} x {r['length']:,}", *_speed_and_peaks(r), cost]
        )
    head = [
        "adapter",
        "resident layers",
        "cap",
        "tokens",
        "s/step",
        "tokens/s",
        "allocated GiB",
        "reserved GiB",
        "cost",
    ]
    return _table("Streamed experts; cost beside all resident with the same workspace (goal 25 %):", head, rows)


def _optimizer(records: Sequence[Record]) -> str:
    rows = [
        [
            r["adapter"],
            f"{r['cap_gib']} GiB",
            f"{r['sequences']} x {r['length']:,}",
            f"{r['optimizer_seconds']:.3f}" if "optimizer_seconds" in r else "out of memory",
            " ".join(f"{loss:.4f}" for loss in r.get("losses", ())),
        ]
        for r in records
    ]
    head = ["adapter", "cap", "tokens", "s", "losses of three steps on the same tokens"]
    return _table("Steps of AdamW on the host, with experts streamed:", head, rows)


def _problem(record: Record) -> str:
    """What was not measured, and why."""
    reason = record.get("error") or record.get("skipped") or record.get("reason") or record.get("sections")
    about = {k: v for k, v in record.items() if k not in ("error", "trace", "skipped", "reason", "sections", "section")}
    return f"not measured: {record['section']} {about or ''}: {reason}"


def _speed_and_peaks(r: Record) -> list[str]:
    if "seconds" not in r:
        return ["out of memory", "", "", ""]
    peaks = [f"{r[name] / GIB:.2f}" for name in ("peak_allocated_bytes", "peak_reserved_bytes")]
    return [f"{r['seconds']:.3f}", f"{r['tokens_per_second']:,.0f}", *peaks]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return title + "\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    main()
