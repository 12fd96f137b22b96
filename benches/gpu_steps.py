"""Training steps of the whole model: seconds, tokens per second, memory, launches, host synchronisations.

A step is forward and backward with gradients kept. The optimiser of the plans is moeft's on the host, which takes no
memory of the GPU and acts once for several steps; its time is not counted.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import gpu_model
from gpu_harness import Bench
from moeft.integration.checkpointing import apply_checkpointing
from moeft.integration.fused_loss import fuse_loss
from moeft.integration.lora import add_lora

GIB = 1 << 30


class Setting(NamedTuple):
    """One model and how it is trained."""

    name: str
    sequences: tuple[tuple[int, int], ...]  # sequences of a step, tokens of each
    packed_experts: bool = True
    packed_rest: bool = True
    train_experts: bool = True
    policies: tuple[str, ...] = ("full",)
    caps_gib: tuple[int, ...] = ()


def settings(bench: Bench) -> list[Setting]:
    """What the issue of speed and memory asks for, most telling first."""
    s = bench.shapes
    longest, packed = s.sequences[-1], s.packed_sequences
    return [
        Setting("nf4, attention and experts", ((packed, longest), (1, longest)), caps_gib=(24, 16)),
        Setting(
            "nf4, attention",
            tuple((1, length) for length in s.sequences),
            train_experts=False,
            policies=("full", "keep_norm_inputs", "none"),
            caps_gib=(16,),
        ),
        Setting("bf16 experts, attention and experts", ((packed, longest),), packed_experts=False),
    ]


def run(bench: Bench) -> None:
    """Build each model once, and time its steps."""
    for setting in settings(bench):
        if bench.is_late:
            bench.write("model", setting=setting.name, skipped="no time left")
            continue
        with bench.section(f"model: {setting.name}"):
            _measure(bench, setting)


def _measure(bench: Bench, setting: Setting) -> None:
    start = time.perf_counter()
    base = gpu_model.build(bench, packed_experts=setting.packed_experts, packed_rest=setting.packed_rest)
    unset = gpu_model.unset_buffers(base)
    if unset:
        raise RuntimeError(f"buffers without numbers: {unset[:5]}")
    gpu_model.inject_routing(base, bench)
    fuse_loss(base)
    targets = ("attention", "experts") if setting.train_experts else ("attention",)
    model = add_lora(base, bench.shapes.rank, targets=targets, dtype=bench.shapes.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    bench.write(
        "model",
        setting=setting.name,
        build_seconds=time.perf_counter() - start,
        resident_bytes=_allocated(bench),
        trained_parameters=sum(p.numel() for p in trained),
    )
    for policy in setting.policies:
        apply_checkpointing(base, policy)
        for sequences, length in setting.sequences:
            if bench.is_late:
                return
            record = {"setting": setting.name, "policy": policy, "sequences": sequences, "length": length}
            attempt(bench, record, lambda s=sequences, n=length: steps(bench, model, trained, s, n))
    apply_checkpointing(base, "full")
    sequences, length = setting.sequences[-1]
    for cap in setting.caps_gib:
        record = {"setting": setting.name, "cap_gib": cap, "sequences": sequences, "length": length}
        with MemoryCap(bench, cap):
            attempt(bench, record, lambda: steps(bench, model, trained, sequences, length, rounds=1))
    _profile(bench, setting, model, trained, *setting.sequences[-1])


def attempt(bench: Bench, record: dict[str, Any], run: Callable[[], dict[str, Any]], section: str = "step") -> None:
    """Write what a measurement gives, or that the memory was not enough; give memory back behind it."""
    try:
        bench.write(section, **record, **run())
    except torch.OutOfMemoryError as error:
        bench.write(section, **record, out_of_memory=" ".join([str(error)[:200], *getattr(error, "__notes__", [])]))
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _step(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids=tokens, position_ids=positions, labels=tokens, num_items_in_batch=tokens.numel()).loss
    loss.backward()
    return loss.detach()


def _inputs(bench: Bench, sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Several sequences packed into one row."""
    tokens = torch.randint(3, bench.shapes.vocabulary, (1, sequences * length), device=bench.device)
    return tokens, torch.arange(length, device=bench.device).repeat(sequences)[None]


def steps(
    bench: Bench, model: nn.Module, trained: list[nn.Parameter], sequences: int, length: int, rounds: int = 3
) -> dict[str, Any]:
    """Seconds, tokens per second, peaks and the last loss of training steps on so many packed sequences."""
    inputs = _inputs(bench, sequences, length)
    losses = []

    def step() -> None:
        losses.append(_step(model, *inputs))
        for parameter in trained:
            parameter.grad = None

    step()
    is_cuda = bench.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(step, rounds)
    return {
        "seconds": seconds,
        "tokens_per_second": sequences * length / seconds,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if is_cuda else 0,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if is_cuda else 0,
        "loss": float(losses[-1]),
    }


def _profile(
    bench: Bench, setting: Setting, model: nn.Module, trained: list[nn.Parameter], sequences: int, length: int
) -> None:
    """Launches of a step, and whether it waits for the device anywhere."""
    from torch.profiler import ProfilerActivity, profile

    inputs = _inputs(bench, sequences, length)
    is_cuda = bench.device.type == "cuda"
    record: dict[str, Any] = {"setting": setting.name, "sequences": sequences, "length": length}
    _step(model, *inputs)
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(model, *inputs)
            record["host_synchronisations"] = 0
        except RuntimeError as error:
            record["host_synchronisations"] = str(error)[:300]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        _step(model, *inputs)
        if is_cuda:
            torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if "CUDA" in str(e.device_type)]
    totals: dict[str, float] = {}
    for event in kernels:
        totals[event.name] = totals.get(event.name, 0) + event.device_time
    longest = sorted(totals.items(), key=lambda item: -item[1])[:25]
    record |= {"launches": len(kernels), "launches_per_layer": len(kernels) / bench.shapes.layers}
    record["microseconds_by_kernel"] = {name[:80]: round(time) for name, time in longest}
    bench.write("profile", **record)
    for parameter in trained:
        parameter.grad = None


def _allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0


class MemoryCap:
    """Let the process take only so much of the device's memory."""

    def __init__(self, bench: Bench, gib: int) -> None:
        self.is_cuda = bench.device.type == "cuda"
        self.gib = gib

    def __enter__(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.gib * GIB / total))

    def __exit__(self, *_: object) -> None:
        if self.is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
