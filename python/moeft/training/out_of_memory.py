"""What filled the memory when a training step ran out of it, and which knob to turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from moeft.errors import MoeftError, TrainingError
from moeft.integration.audit import audit
from moeft.integration.streaming import slot_bytes, streamed_bytes
from moeft.kernels.out_of_memory import notes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

GIB = 2**30
CPU_MESSAGES = ("can't allocate memory", "not enough memory")
PACKED_EXPERTS = "packed experts"
# Largest part of the memory -> what makes it smaller.
KNOBS = {
    "experts": "pack them: NF4Config(experts=True), and double_quant=True for another 8 %",
    PACKED_EXPERTS: "stream them from host memory: memory.experts: stream, or from files with memory.backing: disk too",
    "attention": "pack it: NF4Config(attention=True)",
    "mlp": "pack it: NF4Config(mlp=True)",
    "adapter": "choose a smaller lora.rank, or fewer lora.targets",
    "gradients": "choose a smaller lora.rank, or fewer lora.targets",
    "optimizer state": "choose an 8-bit optimizer such as optim: adamw_bnb_8bit, or a smaller lora.rank",
    "activations and temporaries": (
        "turn on gradient_checkpointing, or choose a smaller per_device_train_batch_size or data.max_length"
    ),
}


class Forecast(Protocol):
    """Anything that says what to change, largest saving first, such as a memory plan."""

    @property
    def advice(self) -> Sequence[Any]:
        """Knobs with a readable form, and ``exists``."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory, on a GPU or on the CPU, where PyTorch has no class for it."""
    on_cpu = isinstance(error, RuntimeError) and any(message in str(error) for message in CPU_MESSAGES)
    return isinstance(error, torch.OutOfMemoryError) or on_cpu


def explain(
    error: BaseException, model: nn.Module, optimizer: Any, step: int, forecast: Forecast | None = None
) -> TrainingError:
    """An error that names the parts of the memory by size, and the knob of the largest that has one.

    Args:
        error: What was raised; chain it.
        model: The model that was trained.
        optimizer: Its optimizer, or None.
        step: Number of the step, from 1.
        forecast: A plan of the same run, whose first advice is then repeated.
    """
    parts = held_bytes(model, optimizer)
    if torch.cuda.is_available():
        parts["activations and temporaries"] = max(0, torch.cuda.max_memory_allocated() - sum(parts.values()))
    ranked = sorted(parts, key=lambda name: -parts[name])
    listed = ", ".join(f"{name} {parts[name] / GIB:.2f} GiB" for name in ranked if parts[name])
    packed = packed_components(model)
    if "experts" in packed and not streamed_bytes(model):
        ranked = [PACKED_EXPERTS if name == "experts" else name for name in ranked]
        parts[PACKED_EXPERTS] = parts.pop("experts")
    turnable = [name for name in ranked if name in KNOBS and name not in packed and parts[name]]
    # What a step allocates is the last straw, whatever else is larger.
    names = dict.fromkeys([*turnable[:1], "activations and temporaries"])
    advice = [f"for {name}: {KNOBS[name]}" for name in names]
    planned = [str(knob).strip() for knob in (forecast.advice if forecast else ()) if knob.exists]
    if planned:
        advice.append(f"the plan says what saves most: {planned[0]}")
    where = "".join(f"\n{note}" for note in notes_of(error))
    return TrainingError(
        f"out of memory in step {step}: {str(error).splitlines()[0]}{where}\nheld: {listed}\n" + "\n".join(advice)
    )


def packed_components(model: nn.Module) -> set[str]:
    """Components of which nothing is left to pack."""
    try:
        rows = audit(model).rows
    except MoeftError:
        return set()
    wide = {row.component for row in rows if row.dtype != "nf4"}
    return {row.component for row in rows} - wide


def held_bytes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes that lie in memory between steps, by component of the model, gradients and optimizer state."""
    try:
        parts = dict(audit(model).bytes_by_component())
    except MoeftError:
        parts = {"model": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))}
    streamed = streamed_bytes(model)
    if streamed:  # only their slots lie on the device
        parts["experts" if "experts" in parts else "model"] -= streamed
        parts["expert slots"] = slot_bytes(model)
    parts["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = getattr(optimizer, "state", {}).values()
    parts["optimizer state"] = sum(
        value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor)
    )
    return parts
