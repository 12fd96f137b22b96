"""Chat rows to packed token ids: moeft beside ``datasets.map`` over ``apply_chat_template``, which makes no labels.

    python benches/data.py ROWS.jsonl --model DIR --rounds 3

Each measurement is a process of its own, in turns: moeft from the file to packs, the cache written; ``datasets`` with
two processes from rows in an Arrow file to token ids; and moeft's second start, from the file and its cache to packs.
Seconds of the wall, seconds of all processors, and the largest resident set of the process and of its largest child.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_LENGTH = 4096


def ours(rows: Path, model: Path, cache: Path) -> float:
    """Seconds from the file to packs, as ``moeft sft`` makes them, the cache included."""
    from moeft.config.sft import Data
    from moeft.data.packing import pack
    from moeft.runs.preview import load_tokenizer
    from moeft.runs.training_rows import training_rows
    from moeft.training.sft import SFTConfig

    tokenizer, _ = load_tokenizer(model, None)
    data = Data.model_validate_json(json.dumps({"train": str(rows), "turns": "trim"}))
    args = SFTConfig(
        output_dir=str(cache), cache_dir=str(cache / "encoded"), max_length=MAX_LENGTH, on_too_long="truncate"
    )
    start = time.perf_counter()
    encoded, _ = training_rows(data, tokenizer, args, lambda text: print(text, file=sys.stderr))
    packed = pack(encoded.examples, MAX_LENGTH)
    assert len(packed.packs[0]["input_ids"])
    seconds = time.perf_counter() - start
    print(packed, file=sys.stderr)
    return seconds


def datasets_map(rows: Path, model: Path, cache: Path) -> float:
    """Seconds of ``datasets.map`` with two processes."""
    from datasets import Dataset

    from moeft.runs.preview import load_tokenizer

    tokenizer, _ = load_tokenizer(model, None)
    data = Dataset.from_json(str(rows), cache_dir=str(cache))

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = tokenizer.apply_chat_template(batch["messages"], truncation=True, max_length=MAX_LENGTH, return_dict=True)
        return {"input_ids": ids["input_ids"]}

    start = time.perf_counter()
    data.map(tokenize, batched=True, num_proc=2, remove_columns=data.column_names)
    return time.perf_counter() - start


SUBJECTS = {"moeft": ours, "datasets.map(num_proc=2)": datasets_map, "moeft, second start": ours}


def measured(subject: str, rows: Path, model: Path, cache: Path) -> dict[str, float]:
    """One measurement in this process."""
    seconds = SUBJECTS[subject](rows, model, cache)
    me, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu": me.ru_utime + me.ru_stime + children.ru_utime + children.ru_stime,
        "rss": me.ru_maxrss / 1e6,
        "child": children.ru_maxrss / 1e6,
    }


def main() -> None:
    """Measure in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.subject:
        print(json.dumps(measured(args.subject, args.rows, args.model, args.cache)))
        return
    found: dict[str, list[dict[str, float]]] = {subject: [] for subject in SUBJECTS}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for subject in SUBJECTS:
                command = [sys.executable, __file__, args.rows, "--model", args.model, "--subject", subject]
                done = subprocess.run(
                    [*map(str, command), "--cache", cache], check=True, stdout=subprocess.PIPE, text=True
                )
                found[subject].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':28}{'seconds':>9}{'CPU s':>9}{'RSS GB':>9}{'child GB':>9}   medians of {args.rounds}")
    for subject, results in found.items():
        cells = (statistics.median(result[name] for result in results) for name in ("seconds", "cpu", "rss", "child"))
        print(f"{subject:28}" + "".join(f"{cell:9.2f}" for cell in cells))


if __name__ == "__main__":
    main()
