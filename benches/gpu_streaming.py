"""Training steps with experts streamed from host memory, beside the same model with all of them on the device.

What streaming costs is read from seconds of a step beside ``resident_seconds``; the limit is the bus, timed here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

import gpu_model
from gpu_harness import Bench
from gpu_memory import GIB, memory_cap, workspace_of
from gpu_training import attempt, optimizer_step, prepare, steps
from moeft.config.memory import Memory
from moeft.config.sft import Lora, Quantization
from moeft.integration.checkpointing import apply_checkpointing
from moeft.integration.streaming import ExpertStream, stream_experts
from moeft.modules import NF4Experts
from moeft.modules.streaming import HostMemory
from moeft.planning import Settings, plan

Load = tuple[int, int]
"""Sequences of a step, and tokens of each."""


class Case(NamedTuple):
    """A stream, and what passes through it."""

    loads: tuple[Load, ...]
    resident: int | None = None  # layers whose experts stay; None for as many as a plan keeps under the cap
    cap_gib: int | None = None


class Adapter(NamedTuple):
    """A model that trains, the card whose workspace it gets, and its cases, most telling first."""

    targets: tuple[str, ...]
    card_gib: int
    cases: tuple[Case, ...]


def adapters(bench: Bench) -> list[Adapter]:
    """What is measured."""
    length, layers = bench.shapes.sequences[-1], bench.shapes.layers
    one, two, many = (1, length), (2, length), (bench.shapes.packed_sequences, length)
    return [
        Adapter(("attention", "experts"), 16, (Case((one,), cap_gib=16),)),
        Adapter(
            ("attention",),
            12,
            (Case((two,), cap_gib=12), Case(tuple(dict.fromkeys((many, two, one))), 0), Case((two,), layers // 2)),
        ),
    ]


def run(bench: Bench) -> None:
    """The bus, then every case."""
    _bus(bench)
    for adapter in adapters(bench):
        if bench.is_late:
            bench.write("streaming", adapter=adapter.targets, skipped="no time left")
            continue
        with bench.section(f"streaming: {', '.join(adapter.targets)}"), workspace_of(adapter.card_gib * GIB):
            _measure(bench, adapter)


def _measure(bench: Bench, adapter: Adapter) -> None:
    base = gpu_model.build(bench)
    model = prepare(bench, base, "experts" in adapter.targets)
    apply_checkpointing(base, "full")
    alone: dict[Load, float] = {}
    for load in dict.fromkeys(load for case in adapter.cases for load in case.loads):
        record = _record(adapter, load) | {"resident": bench.shapes.layers}
        attempt(bench, record, lambda n=load: _seconds_noted(bench, model, n, alone), "streaming")
    for case in adapter.cases:
        if bench.is_late:
            bench.write("streaming", case=case._asdict(), skipped="no time left")
            continue
        with bench.section(f"stream: {case._asdict()}"), _streamed(bench, model, adapter, case) as stream:
            for load in case.loads:
                record = _record(adapter, load) | {"resident": len(stream.resident)}
                record |= {"resident_seconds": alone.get(load)}
                record |= {} if case.cap_gib is None else {"cap_gib": case.cap_gib}
                attempt(bench, record, lambda n=load, s=stream: _through(bench, model, n, s), "streaming")
            if case.cap_gib is not None:
                record = _record(adapter, load) | {"cap_gib": case.cap_gib}
                attempt(bench, record, lambda n=load: optimizer_step(bench, model, _trained(model), *n), "optimizer")


def _record(adapter: Adapter, load: Load) -> dict[str, Any]:
    torch.manual_seed(7)  # the same tokens each time, so that losses can be compared
    return {"adapter": ", ".join(adapter.targets), "sequences": load[0], "length": load[1]}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _seconds_noted(bench: Bench, model: nn.Module, load: Load, seconds: dict[Load, float]) -> dict[str, Any]:
    found = steps(bench, model, _trained(model), *load)
    seconds[load] = found["seconds"]
    return found


def _through(bench: Bench, model: nn.Module, load: Load, stream: ExpertStream) -> dict[str, Any]:
    """Steps, and what crossed the bus in one of them."""
    traffic = stream.ring.traffic
    copied, late = traffic.copied_bytes, traffic.late
    found = steps(bench, model, _trained(model), *load)
    found["copied_bytes_per_step"] = (traffic.copied_bytes - copied) / found["steps"]
    found["late_layers_per_step"] = (traffic.late - late) / found["steps"]
    return found | {"slot_bytes": stream.ring.num_bytes, "host_bytes": stream.host_bytes}


@contextmanager
def _streamed(bench: Bench, model: nn.Module, adapter: Adapter, case: Case) -> Iterator[ExpertStream]:
    """The model with most layers streamed; experts lie in host memory again behind it."""
    resident = case.resident
    if resident is None:
        assert case.cap_gib is not None
        resident = _planned(bench, adapter.targets, case.cap_gib, case.loads[0])
    modules = [module for module in model.modules() if isinstance(module, NF4Experts)]
    for module in modules:
        module.to("cpu")
    stream = stream_experts(model, bench.device, resident)
    try:
        model.to(bench.device)
        gc.collect()
        with nullcontext() if case.cap_gib is None else memory_cap(bench, case.cap_gib):
            yield stream
    finally:
        stream.close()
        for module in modules:
            module.to("cpu")


def _planned(bench: Bench, targets: tuple[str, ...], cap_gib: int, load: Load) -> int:
    """Layers that stay resident under a cap, as ``moeft plan`` says."""
    settings = Settings(
        quantization=Quantization(attention=True, mlp=True, double_quant=True),
        lora=Lora(rank=bench.shapes.rank, targets=targets, dtype="bfloat16"),
        batch_size=load[0],
        max_length=load[1],
        optimizer="adamw_moeft_host",
        memory=Memory(experts="stream"),
    )
    forecast = plan(gpu_model.text_config(bench.shapes), f"{cap_gib}GiB", settings)
    return 0 if forecast.streaming is None else forecast.streaming.resident


def _bus(bench: Bench) -> None:
    """Bytes per second from host memory, registered and not."""
    if bench.device.type == "cuda":
        from moeft.modules.streaming import cuda

        memories = {
            "registered": HostMemory(1 << 30, cuda.register, cuda.unregister),
            "pageable": HostMemory(1 << 30),
        }
    else:
        memories = {"pageable": HostMemory(1 << 16)}
    for name, memory in memories.items():
        memory.bytes.fill_(1)
        target = torch.empty(memory.bytes.numel(), dtype=torch.uint8, device=bench.device)
        pieces = memory.pieces(0, [(0, memory.bytes.numel())])

        def copy(pieces: Any = pieces, target: torch.Tensor = target) -> None:
            for offset, piece in pieces:
                target[offset : offset + piece.numel()].copy_(piece, non_blocking=True)

        seconds = bench.seconds(copy)
        bench.write("bus", memory=name, obstacle=memory.obstacle, bytes_per_second=target.numel() / seconds)
        memory.close()
