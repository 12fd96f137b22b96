"""Time one optimiser step on the CPU beside its peers, interleaved; correctness first.

usage: python benches/optimizers.py [--out FILE.jsonl] [--parameters N] [--rounds N] [--threads N ...]
Peers: torch's fused AdamW, bitsandbytes' AdamW8bit. The limit is torch's copy of as many bytes as a step has to move,
measured in the same rounds; a step may beat it, because it writes to memory that it has just read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import bitsandbytes
import torch
from torch import Tensor

from moeft.provenance.environment import describe_environment
from moeft.training.optim import HostAdamW

RATE = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
COPY = "limit: torch copy of {} bytes per parameter"


@dataclass
class Subject:
    """One optimiser over one parameter, and the bytes that a step reads and writes per parameter."""

    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    dtype: torch.dtype
    nbytes: int


SUBJECTS = {
    "moeft, 32-bit state": Subject(lambda p: HostAdamW(p, **RATE), torch.float32, 28),
    "torch fused, 32-bit state": Subject(lambda p: torch.optim.AdamW(p, fused=True, **RATE), torch.float32, 28),
    "moeft, 8-bit state": Subject(lambda p: HostAdamW(p, state_bits=8, **RATE), torch.float32, 16),
    "moeft, 8-bit state, bf16 with master": Subject(lambda p: HostAdamW(p, state_bits=8, **RATE), torch.bfloat16, 16),
    "bitsandbytes, 8-bit state": Subject(lambda p: bitsandbytes.optim.AdamW8bit(p, **RATE), torch.float32, 16),
}


def check(names: list[str]) -> None:
    """After three steps 32-bit optimisers agree within rounding, and so do 8-bit ones."""
    weights: dict[int, Tensor] = {}
    for name in names:
        subject = SUBJECTS[name]
        if subject.dtype != torch.float32:
            continue
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(100_000, generator=generator))
        optimizer = subject.make([parameter])
        for _ in range(3):
            parameter.grad = torch.randn(100_000, generator=generator)
            optimizer.step()
        torch.testing.assert_close(parameter.detach(), weights.setdefault(subject.nbytes, parameter.detach()))


def bench(names: list[str], count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by subject; every round runs all of them once."""
    steps: dict[str, Callable[[], object]] = {}
    gradients = {dtype: torch.randn(count).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name in names:
        subject = SUBJECTS[name]
        parameter = torch.nn.Parameter(torch.randn(count).to(subject.dtype))
        parameter.grad = gradients[subject.dtype]
        steps[name] = subject.make([parameter]).step
    source = torch.zeros(28 // 2 * count, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(1)
    for nbytes in (28, 16):
        size = nbytes // 2 * count
        steps[COPY.format(nbytes)] = lambda size=size: target[:size].copy_(source[:size])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=2**25)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="SUBJECT")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(max(arguments.threads))  # read when the core starts its first thread
    torch.manual_seed(0)
    check(arguments.only)
    machine = {
        "cpu": describe_environment()["hardware"]["cpu"],
        **{name: metadata.version(name) for name in ("torch", "bitsandbytes", "moeft")},
    }
    print(machine)
    bytes_of = {name: SUBJECTS[name].nbytes for name in arguments.only} | {COPY.format(n): n for n in (28, 16)}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds = bench(arguments.only, arguments.parameters, arguments.rounds)
        for name, rounds in seconds.items():
            moved, limit = bytes_of[name] * arguments.parameters, seconds[COPY.format(bytes_of[name])]
            middle, best = statistics.median(rounds), min(rounds)
            share = statistics.median(theirs / ours for ours, theirs in zip(rounds, limit, strict=True))
            result = {
                "what": name,
                "parameters": arguments.parameters,
                "threads": threads,
                "median_seconds": middle,
                "best_seconds": best,
                "median_gb_per_second": moved / middle / 1e9,
                "best_gb_per_second": moved / best / 1e9,
                "share_of_copy": share,
            }
            print(
                f"{threads} thr  {name:<46}{middle * 1e3:>9.1f} ms, best {best * 1e3:>8.1f} ms"
                f"{moved / middle / 1e9:>8.1f} GB/s{share:>7.0%} of copy"
            )
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result | machine) + "\n")


if __name__ == "__main__":
    main()
