"""Time the CPU kernels beside their peers and the machine's limits, interleaved; correctness first.

usage: python benches/cpu.py [--out FILE.jsonl] [--rounds N] [--threads N ...] [--cpu-time]
                             [--only nf4 routing experts optimizers attention]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    """Test, run everything and print a table per case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpu-time", action="store_true", help="time of the thread, for --threads 1 on a busy machine")
    names = ["nf4", "routing", "experts", "optimizers", "attention"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != [1]:
        parser.error("--cpu-time counts one thread: give --threads 1")
    os.environ["RAYON_NUM_THREADS"] = str(max(arguments.threads))  # read when the core is first used

    import torch

    import cpu_attention
    import cpu_experts
    import cpu_nf4
    import cpu_optimizers
    import cpu_routing
    import harness

    groups = {
        "nf4": cpu_nf4,
        "routing": cpu_routing,
        "experts": cpu_experts,
        "optimizers": cpu_optimizers,
        "attention": cpu_attention,
    }
    chosen = [groups[name] for name in arguments.only]
    harness.require_green(test for group in chosen for test in group.TESTS)
    print(harness.machine())
    torch.manual_seed(0)
    for group in chosen:
        for case in group.cases():
            for threads in arguments.threads:
                harness.set_threads(threads)
                results = harness.measure(case, arguments.rounds, threads, arguments.cpu_time)
                harness.report(results, arguments.out)


if __name__ == "__main__":
    main()
