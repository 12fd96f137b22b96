"""Values quantised per second of CPU time, by moeft and by ggml, on one thread and the same values.

    python benches/gguf_blocks.py [--rounds 3]

Bytes are compared first: a type whose blocks differ has no row in the table. ggml is that of libgguf.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import libgguf
import numpy as np

from moeft import _core
from moeft.provenance.environment import describe_environment

TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "q5_0", "q5_1", "q4_0")
ROWS, COLUMNS = 1024, 2816  # Columns of Gemma 4 26B-A4B.


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--rounds", type=int, default=3)
    given = words.parse_args()
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
    print(f"{describe_environment()['hardware']['cpu']}, one thread, best of {given.rounds} rounds in turn")
    print("| type | moeft, million a second | ggml | times |\n|---|---:|---:|---:|")
    for name in TYPES:
        kind = libgguf.GGMLQuantizationType[name.upper()]
        expected = libgguf.quantize_rows(values, kind)
        blocks = np.zeros(expected.size, np.uint8)

        def ours(name: str = name, blocks: np.ndarray = blocks) -> None:
            _core.gguf_quantize(values, name, COLUMNS, None, blocks, 1)

        def theirs(kind: int = kind) -> None:
            libgguf.quantize_rows(values, kind)

        ours()
        if not np.array_equal(blocks, expected.view(np.uint8).reshape(-1)):
            print(f"| {name} | other bytes than ggml | | |")
            continue
        taken = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(given.rounds)]
        mine, its = (values.size / min(of) / 1e6 for of in zip(*taken, strict=True))
        print(f"| {name} | {mine:,.0f} | {its:,.0f} | {mine / its:.1f} |", flush=True)


def cpu_seconds(call: Callable[[], None]) -> float:
    """Least of the passes in about a tenth of a second, three at least."""
    best, passes, spent = float("inf"), 0, 0.0
    while passes < 3 or spent < 0.1:
        start = time.process_time()
        call()
        taken = time.process_time() - start
        best, passes, spent = min(best, taken), passes + 1, spent + taken
    return best


if __name__ == "__main__":
    main()
