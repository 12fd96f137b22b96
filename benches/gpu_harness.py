"""Shapes, timing and JSON lines of the GPU bench."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeft.kernels import nf4
from moeft.kernels.grouped_linear.gpu import release_workspaces
from moeft.kernels.nf4 import NESTED_BLOCK, Layout, NestedStatistics, NF4Weight


class Shapes(NamedTuple):
    """A model's sizes and the numbers of tokens to time."""

    experts: int = 128
    hidden: int = 2816
    inner: int = 704
    top_k: int = 8
    rank: int = 16
    vocabulary: int = 262144
    layers: int = 30
    tokens: tuple[int, ...] = (128, 512, 2048, 4096, 16384)
    sequences: tuple[int, ...] = (512, 2048, 4096)
    packed_sequences: int = 4
    dtype: torch.dtype = torch.bfloat16


# For a run through every line where there is no GPU.
TINY = Shapes(4, 64, 64, 2, 4, 96, 2, (6,), (8,), 2, torch.float32)


class Bench:
    """A device, the shapes, and the file of results."""

    def __init__(self, shapes: Shapes, out: Path, deadline_seconds: float) -> None:
        self.shapes = shapes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.out = out
        self.start = time.perf_counter()
        self.deadline_seconds = deadline_seconds
        self.failed: list[str] = []
        self.is_lost = False  # an illegal access leaves a process without its device

    def write(self, section: str, **record: Any) -> None:
        """Append a line and print it."""
        line = json.dumps({"section": section, **record}, default=str)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Note what fails and go on; give memory back and say how long it took."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.failed.append(name)
            self.write(name, error=f"{type(error).__name__}: {error}"[:2000], trace=traceback.format_exc()[-2000:])
        self.give_memory_back()
        self.write("time", of=name, seconds=round(time.perf_counter() - start, 2))

    def give_memory_back(self) -> None:
        """Leave the device to the next measurement, and find out whether it still answers."""
        release_workspaces()
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                self.is_lost = True

    @property
    def is_late(self) -> bool:
        """Whether the time for all sections is used up."""
        return self.seconds_left < 0

    @property
    def seconds_left(self) -> float:
        """Until the time is used up."""
        return self.deadline_seconds - (time.perf_counter() - self.start)

    def seconds(self, run: Callable[[], object], rounds: int = 7) -> float:
        """Median of a function's times after two calls that warm up."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        run()
        run()
        times = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[rounds // 2]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.shapes.dtype)

    def packed(self, *shape: int) -> NF4Weight:
        """A double-quantised weight of random bytes, standard deviation about 0.02."""
        layout = Layout.of(shape, 64)
        stacked = len(shape) > 2
        codes = (layout.packed_shape(stacked), layout.absmax_shape(stacked))
        packed, absmax = (torch.randint(0, 256, s, dtype=torch.uint8, device=self.device) for s in codes)
        blocks = -(-layout.groups * layout.blocks // NESTED_BLOCK)
        nested = NestedStatistics(
            torch.full((blocks,), 0.01, device=self.device), torch.full((1,), 0.05, device=self.device)
        )
        return NF4Weight(packed, absmax, torch.Size(shape), 64, nested)

    def routing(self, tokens: int) -> Tensor:
        """Experts of each token, ``[tokens, k]``: shares with a coefficient of variation of 0.7, as prose gives."""
        # Of a Dirichlet distribution with equal parameters a, the coefficient of variation is about 1 / sqrt(a).
        concentration = torch.full((self.shapes.experts,), 1 / 0.7**2)
        shares = torch.distributions.Dirichlet(concentration).sample((1,)).to(self.device)
        noise = -torch.log(-torch.log(torch.rand(tokens, self.shapes.experts, device=self.device)))
        return (shares.log() + noise).topk(self.shapes.top_k).indices


def dense(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The restored weight."""
    return nf4.dequantize(weight, dtype=dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the root mean square."""
    difference, norm = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm.clamp(min=1e-30))
