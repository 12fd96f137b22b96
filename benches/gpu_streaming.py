"""Training steps with experts streamed from host memory, beside the same model with all of them on the device.

What streaming costs is read from seconds of a step beside ``resident``; the limit is the bus, timed here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import gpu_model
from gpu_harness import Bench
from gpu_steps import MemoryCap, attempt, steps
from moeft.config.memory import Memory
from moeft.config.sft import Lora, Quantization
from moeft.integration.checkpointing import apply_checkpointing
from moeft.integration.fused_loss import fuse_loss
from moeft.integration.lora import add_lora
from moeft.integration.streaming import ExpertStream, stream_experts
from moeft.modules import NF4Experts
from moeft.modules.streaming import HostMemory
from moeft.planning import Settings, plan

CAPS_GIB = (16, 12)


def run(bench: Bench) -> None:
    """The bus, then steps: all experts resident, half of them, none; and what a plan gives under caps of memory."""
    _bus(bench)
    base = gpu_model.build(bench)
    gpu_model.inject_routing(base, bench)
    fuse_loss(base)
    model = add_lora(base, bench.shapes.rank, targets=("attention",), dtype=bench.shapes.dtype)
    apply_checkpointing(base, "full")
    length, packed = bench.shapes.sequences[-1], bench.shapes.packed_sequences
    loads = tuple(dict.fromkeys(((packed, length), (2, length), (1, length))))
    seconds = {load: _step(bench, model, load, None, {}) for load in loads}
    layers = bench.shapes.layers
    for resident in dict.fromkeys((layers // 2, 0)):
        with _streamed(bench, model, resident) as stream:
            for load in loads:
                if not bench.is_late:
                    _step(bench, model, load, stream, {"resident_seconds": seconds[load]})
    for cap in CAPS_GIB:
        if bench.is_late:
            return
        with _streamed(bench, model, _planned(bench, cap, length)) as stream, MemoryCap(bench, cap):
            _step(bench, model, (2, length), stream, {"cap_gib": cap, "resident_seconds": seconds[2, length]})


def _step(
    bench: Bench, model: nn.Module, load: tuple[int, int], stream: ExpertStream | None, record: dict[str, Any]
) -> float | None:
    """Write one line; its seconds, or None if the memory was not enough."""
    torch.manual_seed(7)  # the same tokens each time, so that losses can be compared
    record |= {"sequences": load[0], "length": load[1]}
    record |= {"resident": bench.shapes.layers if stream is None else len(stream.resident)}
    found: dict[str, Any] = {}

    def measured() -> dict[str, Any]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.update(steps(bench, model, trained, *load))
        if stream is not None:
            before = stream.ring.traffic.copied_bytes, stream.ring.traffic.late
            steps(bench, model, trained, *load, rounds=1)
            found["copied_bytes_of_some_steps"] = stream.ring.traffic.copied_bytes - before[0]
            found["late"] = stream.ring.traffic.late - before[1]
            found["slot_bytes"], found["host_bytes"] = stream.ring.num_bytes, stream.host_bytes
        return found

    attempt(bench, record, measured, "streaming")
    return found.get("seconds")


@contextmanager
def _streamed(bench: Bench, model: nn.Module, resident: int) -> Iterator[ExpertStream]:
    """The model with all but some layers streamed; experts lie in host memory again behind it."""
    modules = [module for module in model.modules() if isinstance(module, NF4Experts)]
    for module in modules:
        module.to("cpu")
    stream = stream_experts(model, bench.device, resident)
    try:
        model.to(bench.device)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        yield stream
    finally:
        stream.close()
        for module in modules:
            module.to("cpu")


def _planned(bench: Bench, cap_gib: int, length: int) -> int:
    """Layers that stay resident under a cap, as ``moeft plan`` says."""
    settings = Settings(
        quantization=Quantization(attention=True, mlp=True, double_quant=True),
        lora=Lora(rank=bench.shapes.rank, targets=("attention",), dtype="bfloat16"),
        max_length=2 * length,
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
