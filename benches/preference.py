"""Pairwise accuracy on held-out hard pairs before and after ``moeft dpo``, on the embedded MoE after ``moeft sft``.

For each seed: supervised training on conversations with calls, hard pairs from the same conversations, held-out pairs
from others, and a second adapter tuned on the pairs. ``log_probs/accuracy`` is the share of held-out pairs whose right
answer the policy finds more likely, as a mean over tokens.

    python benches/preference.py --rows glaive_300.jsonl [--seeds 3] [--sft-steps 50] [--dpo-steps 40] [--out FOLDER]

Without ``--rows``, the demo's ops-agent rows; held-out requests have combinations that never occur in training.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness import machine
from moeft import checkpoint
from moeft.config import SftRecipe
from moeft.config.dpo import DpoRecipe
from moeft.data.reading import read_rows
from moeft.data.rows import Message
from moeft.demo import ops_agent
from moeft.demo.ops_schema import ops_tools
from moeft.demo.run import BASE, THREADS
from moeft.hard.requests import Request
from moeft.runs import dpo, sft
from moeft.runs.hard import BuildSettings, Toolbox, build_pairs
from moeft.tool_protocols import ToolCall

HELD_OUT = 0.3
"""Share of the conversations of a file that are held out."""
FIGURES = ("log_probs/accuracy", "rewards/accuracy", "rewards/margin", "log_probs/chosen_drift", "kl")


def main() -> None:
    """Measure each seed, and print the spread of the gain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="conversations with calls and their tools, such as Glaive's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, default=50)
    parser.add_argument("--dpo-steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=156, help="to train on; half as many are held out")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path, help="file of JSON lines to write")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    out = options.out or Path(tempfile.mkdtemp(prefix="preference-"))
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "record")}
    lines = [machine() | {"options": asked | {"rows": options.rows and options.rows.name}}]
    for seed in range(options.seeds):
        lines.append(measure(out / f"seed-{seed}", seed, options))
        print(json.dumps(lines[-1]), flush=True)
    gains = [line["after"]["log_probs/accuracy"] - line["before"]["log_probs/accuracy"] for line in lines[1:]]
    print(
        f"pairwise accuracy rose by {statistics.fmean(gains):.1%} ({min(gains):.1%} to {max(gains):.1%}) over "
        f"{len(gains)} seeds"
    )
    if options.record is not None:
        options.record.write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out figures of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    tools = write_rows(folder, seed, options.rows)
    write_pairs(folder, seed, options.pairs, tools)
    if not (folder / "packed").exists():
        checkpoint.quantize(BASE, folder / "packed")
    if not (folder / "sft" / "adapter").is_dir():
        sft.run(supervised(folder, seed, options), show=lambda text: None)
    run = dpo.run(preferring(folder, seed, options), show=lambda text: None)
    metrics = run.read_json("metrics.json")
    figures = {
        when: {name: round(metrics["heldout"][when][name], 4) for name in FIGURES} for when in ("before", "after")
    }
    counts = {name: metrics["data"][name] for name in ("train_pairs", "heldout_pairs", "rejected_pairs")}
    return {"seed": seed, **counts, **figures, "seconds": round(time.perf_counter() - start, 1)}


def write_rows(folder: Path, seed: int, rows: Path | None) -> Toolbox:
    """Schemas, conversations to train on and others that are held out."""
    place = folder / "tools.json"
    if rows is None:
        place.write_text(json.dumps(ops_tools()))
        train, held_out = ops_agent.generate(seed)
        ops_agent.write_jsonl(train, folder / "train.jsonl")
        ops_agent.write_jsonl(held_out, folder / "heldout.jsonl")
        return Toolbox.read(place, "bracket")
    by_name: dict[str, Any] = {}
    for row in read_rows(rows, turns="any").rows:
        for tool in row.tools or ():
            by_name.setdefault(tool["function"]["name"], tool)
    place.write_text(json.dumps(list(by_name.values())))
    tools = Toolbox.read(place, "glaive")
    requests = [request for request in tools.requests(rows, lambda text: None) if request.calls]
    random.Random(seed).shuffle(requests)
    cut = round(HELD_OUT * len(requests))
    for name, some in (("heldout", requests[:cut]), ("train", requests[cut:])):
        ops_agent.write_jsonl(as_texts(some, tools), folder / f"{name}.jsonl")
    return tools


def as_texts(requests: Sequence[Request], tools: Toolbox) -> list[Any]:
    """Conversations that end with the right calls, written as the protocol does: the base's template knows no tools."""

    def turn(message: Message) -> Message:
        if message["role"] == "tool":
            return {"role": "user", "content": f"{message.get('name', 'tool')}: {message['content']}"}
        functions = [call["function"] for call in message.get("tool_calls", ())]
        calls = tuple(ToolCall(function["name"], function["arguments"]) for function in functions)
        return {"role": message["role"], "content": tools.protocol.reply(message["content"], calls)}

    return [
        {
            "messages": [
                *map(turn, request.prompt),
                {"role": "assistant", "content": tools.protocol.reply(request.said, request.calls)},
            ]
        }
        for request in requests
    ]


def write_pairs(folder: Path, seed: int, pairs: int, tools: Toolbox) -> None:
    """Pairs to train on, and held-out ones from held-out conversations."""
    held_out = folder / "heldout.jsonl"
    for rows, name, count, exclude in (
        (held_out, "heldout-pairs.jsonl", pairs // 2, ()),
        (folder / "train.jsonl", "pairs.jsonl", pairs, (held_out,)),
    ):
        if not (folder / name).exists():
            settings = BuildSettings(count, seed=seed)
            build_pairs(tools, rows, folder / name, settings, exclude=exclude, show=lambda text: None)


def supervised(folder: Path, seed: int, options: argparse.Namespace) -> SftRecipe:
    """The recipe of the policy's start."""
    return SftRecipe.model_validate(
        {
            "model": folder / "packed",
            "output": folder / "sft",
            "dtype": "float32",
            "lora": {"rank": 16, "alpha": 32, "init_seed": seed},
            "data": {
                "train": (folder / "train.jsonl",),
                "max_length": options.max_length,
                "on_too_long": "truncate_left",
                "train_on": "last",
            },
            "training": arguments(options.sft_steps, seed, 5e-3),
        }
    )


def preferring(folder: Path, seed: int, options: argparse.Namespace) -> DpoRecipe:
    """The recipe of preference tuning."""
    return DpoRecipe.model_validate(
        {
            "model": folder / "packed",
            "output": folder / "dpo",
            "dtype": "float32",
            "lora": {"rank": 8, "alpha": 16, "init_seed": seed, "stack_on": (folder / "sft" / "adapter",)},
            "data": {
                "train": (folder / "pairs.jsonl",),
                "eval": folder / "heldout-pairs.jsonl",
                "max_length": options.max_length,
                "on_too_long": "truncate_left",
                "layout": "shared_prefix",
            },
            "preference": {"loss": "sigmoid_norm", "beta": 2.0, "sft_weight": 1.0},
            "training": arguments(options.dpo_steps, seed, options.learning_rate),
        }
    )


def arguments(steps: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "logging_steps": 10,
        "save_strategy": "no",
        "seed": seed,
        "use_cpu": True,
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    main()
