"""What a training step launches, and where the host waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch import profiler as torch_profiler

from gpu_harness import Bench
from gpu_training import drop_gradients, inputs_of, step


def profile(bench: Bench, model: nn.Module, trained: list[nn.Parameter], sequences: int, length: int) -> dict[str, Any]:
    """Launches of a step, and where it waits for the device."""
    inputs = inputs_of(bench, sequences, length)
    is_cuda = bench.device.type == "cuda"
    record: dict[str, Any] = {}
    try:
        step(model, inputs)
        if is_cuda:
            found = waits(lambda: step(model, inputs))
            record |= {"host_synchronisations": found.total(), "waits_at": dict(found.most_common(10))}
        with torch_profiler.profile(
            activities=[torch_profiler.ProfilerActivity.CUDA if is_cuda else torch_profiler.ProfilerActivity.CPU]
        ) as profiler:
            step(model, inputs)
            if is_cuda:
                torch.cuda.synchronize()
    finally:
        drop_gradients(trained)
    kernels = [e for e in profiler.events() if "CUDA" in str(e.device_type)]
    totals: dict[str, float] = {}
    for event in kernels:
        totals[event.name] = totals.get(event.name, 0) + event.device_time
    longest = sorted(totals.items(), key=lambda item: -item[1])[:25]
    record |= {"launches": len(kernels), "launches_per_layer": len(kernels) / bench.shapes.layers}
    return record | {"microseconds_by_kernel": {name[:80]: round(time) for name, time in longest}}


def waits(run: Callable[[], object]) -> Counter[str]:
    """Places at which a function waits for the device, as PyTorch warns of them, with how often."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return Counter(f"{w.filename}:{w.lineno}" for w in found if "synchronizing CUDA operation" in str(w.message))
