"""Steps of training, as the trainer runs them on packed rows: a pack in each row, attention told of documents.

A step is forward and backward of a micro-batch. The optimiser of the plans is moeft's on the host, which takes no
memory of the GPU and acts once for several micro-batches; its time is measured apart.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gpu_model
from gpu_harness import Bench
from moeft.integration.document_masks import mask_documents
from moeft.integration.document_reading import attend_inside_documents
from moeft.integration.fused_lora import fuse_lora
from moeft.integration.fused_loss import fuse_loss
from moeft.integration.fused_norms import fuse_norms
from moeft.integration.lora import add_lora
from moeft.training.optim import HostAdamW


def prepare(bench: Bench, base: nn.Module, train_experts: bool) -> nn.Module:
    """A model as the trainer prepares it, with an adapter."""
    gpu_model.inject_routing(base, bench)
    mask_documents(base, on_host=False)
    if reason := attend_inside_documents(base):
        bench.write("model", skipped=f"attention inside documents, so masks are made: {reason}")
    fuse_loss(base)
    if bench.device.type != "cpu":
        fuse_norms(base)
    targets = ("attention", "experts") if train_experts else ("attention",)
    model = add_lora(base, bench.shapes.rank, targets=targets, dtype=bench.shapes.dtype)
    fuse_lora(model.get_base_model())
    return model


def attempt(bench: Bench, record: dict[str, Any], run: Callable[[], dict[str, Any]], section: str = "step") -> None:
    """Write what a measurement gives, or what went wrong; give memory back behind it, so that the next one has it."""
    try:
        bench.write(section, **record, **run())
    except torch.OutOfMemoryError as error:
        bench.write(section, **record, out_of_memory=" ".join([str(error)[:200], *getattr(error, "__notes__", [])]))
    except Exception as error:
        bench.failed.append(f"{section} {record}")
        trace = traceback.format_exc()[-2000:]
        bench.write(section, **record, error=f"{type(error).__name__}: {error}"[:500], trace=trace)
    bench.give_memory_back()


Inputs = dict[str, Any]


def step(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    loss = model(**inputs, labels=inputs["input_ids"], num_items_in_batch=inputs["input_ids"].numel()).loss
    loss.backward()
    return loss.detach()


def inputs_of(bench: Bench, sequences: int, length: int) -> Inputs:
    """Rows of one sequence each, their positions, and the lengths of their documents."""
    return {
        "input_ids": torch.randint(3, bench.shapes.vocabulary, (sequences, length), device=bench.device),
        "position_ids": torch.arange(length, device=bench.device).expand(sequences, -1),
        "documents": [[length]] * sequences,
    }


def steps(
    bench: Bench, model: nn.Module, trained: list[nn.Parameter], sequences: int, length: int, rounds: int = 3
) -> dict[str, Any]:
    """Seconds, tokens per second, peaks and the last loss of training steps on so many packed sequences."""
    inputs = inputs_of(bench, sequences, length)
    losses = []

    def run() -> None:
        losses.append(step(model, inputs))
        drop_gradients(trained)

    is_cuda = bench.device.type == "cuda"
    try:
        run()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = bench.seconds(run, rounds)
    finally:
        drop_gradients(trained)  # also those of a step that ran out of memory
    return {
        "seconds": seconds,
        "tokens_per_second": sequences * length / seconds,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if is_cuda else 0,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if is_cuda else 0,
        "loss": float(losses[-1]),
        "steps": len(losses),
    }


def optimizer_step(
    bench: Bench, model: nn.Module, trained: list[nn.Parameter], sequences: int, length: int
) -> dict[str, Any]:
    """Seconds of a step of AdamW on the host, and losses before and behind it; the weights are put back."""
    inputs = inputs_of(bench, sequences, length)
    before = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    optimizer = HostAdamW(trained, lr=1e-4)
    losses, seconds = [], []
    try:
        for _ in range(3):  # the first makes the state
            losses.append(step(model, inputs))
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            optimizer.zero_grad()
    finally:
        drop_gradients(trained)
        with torch.no_grad():
            for parameter, weights in zip(trained, before, strict=True):
                parameter.copy_(weights)
    return {"optimizer_seconds": seconds[-1], "losses": [float(loss) for loss in losses]}


def drop_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = None
