"""A plan spread over several GPUs: what each holds, and what it sends and receives in a step.

N GPUs. A ring moves ``(N - 1) / N`` of a tensor into each GPU to gather or reduce-scatter it, and twice that to
all-reduce it; the same goes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeft.planning.adapters import ADAM_BYTES, HOST_OPTIMIZERS, optimizer_bytes
from moeft.planning.report import WEIGHTS, Plan
from moeft.planning.rows import Forecast
from moeft.planning.sizes import format_bytes
from moeft.planning.weights import FLOAT_BYTES

STRATEGIES = ("ddp", "fsdp", "zero3")
MASTER_BYTES = 4


@dataclass(frozen=True)
class Spread:
    """One GPU of several. ``str()`` is a few lines.

    Attributes:
        gpus: How many.
        strategy: One of :data:`STRATEGIES`.
        replicated_bytes: Weights that every GPU holds whole.
        sharded_bytes: Its shard of weights, gradients, masters and optimiser state.
        gathered_bytes: Whole weights of the two largest layers, one in use and one on its way, or of the embeddings.
        step_bytes: Its own activations, buffers and temporaries at the peak, fragmentation and context.
        gather_bytes_per_step: Received to put weights together, of one micro-batch: forward, and backward again.
        reduce_bytes_per_step: Received to sum gradients.
    """

    gpus: int
    strategy: str
    replicated_bytes: int
    sharded_bytes: int
    gathered_bytes: int
    step_bytes: int
    gather_bytes_per_step: int
    reduce_bytes_per_step: int

    @property
    def device_bytes(self) -> int:
        """All that the process takes from its GPU."""
        return self.replicated_bytes + self.sharded_bytes + self.gathered_bytes + self.step_bytes

    @property
    def bytes_per_step(self) -> int:
        """All that a GPU receives in a step of one micro-batch."""
        return self.gather_bytes_per_step + self.reduce_bytes_per_step

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, derived figures included."""
        return {**vars(self), "device_bytes": self.device_bytes, "bytes_per_step": self.bytes_per_step}

    def __str__(self) -> str:
        parts = {
            "held whole": self.replicated_bytes,
            "its shard": self.sharded_bytes,
            "gathered": self.gathered_bytes,
            "of its own rows": self.step_bytes,
        }
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        return (
            f"each of {self.gpus} GPUs with {self.strategy}: {format_bytes(self.device_bytes)} ({listed})\n"
            f"received per GPU and step of one micro-batch: {format_bytes(self.bytes_per_step)} (weights "
            f"{format_bytes(self.gather_bytes_per_step)}, gradients {format_bytes(self.reduce_bytes_per_step)})"
        )


def spread(forecast: Forecast, plan: Plan, gpus: int, strategy: str) -> Spread:
    """Spread a plan of one GPU over several.

    Args:
        forecast: Its figures.
        plan: The plan.
        gpus: GPUs, one process each.
        strategy: "ddp" holds everything on each. "fsdp" shards all but packed weights, "zero3" these too; both keep
            float32 masters of 16-bit weights that train, sum their gradients in float32 and hold moments on the GPU.

    Raises:
        ValueError: If there is no GPU, or the strategy is unknown.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}, expected 1 or more")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    settings = forecast.settings
    gradients = plan.bytes_of("gradients") + plan.bytes_of("gradients in full")
    state = plan.bytes_of("optimizer state")
    adapters = sum(row.bytes for row in plan.rows if row.component.startswith("adapter "))
    weights = sum(row.bytes for row in plan.rows if row.component in WEIGHTS)
    step_bytes = plan.device_bytes - weights - adapters - gradients - state
    moved = (gpus - 1) / gpus
    if strategy == "ddp":
        held = weights + adapters + gradients + state
        return Spread(gpus, strategy, held, 0, 0, step_bytes, 0, round(2 * moved * gradients))
    packed = sum(w.bytes(settings.dtype, settings.quantization) for w in forecast.weights if w.packed)
    replicated = packed if strategy == "fsdp" else 0
    own = forecast.trained_parameters()
    masters = own * (MASTER_BYTES - FLOAT_BYTES[settings.dtype])
    reduced = gradients + masters  # gradients of masters are as wide as these
    adapted = sum(row.parameters for row in plan.rows if row.component.startswith("adapter "))
    per_parameter = ADAM_BYTES if settings.optimizer in HOST_OPTIMIZERS else optimizer_bytes(settings.optimizer)[0]
    moments = round((own + adapted) * per_parameter)
    whole = weights - replicated + adapters
    return Spread(
        gpus,
        strategy,
        replicated_bytes=replicated,
        sharded_bytes=-(-(whole + masters + reduced + moments) // gpus),
        gathered_bytes=_gathered(forecast, sharded_packed=strategy == "zero3"),
        step_bytes=step_bytes,
        gather_bytes_per_step=round(2 * moved * whole),
        reduce_bytes_per_step=round(moved * reduced),
    )


def _gathered(forecast: Forecast, sharded_packed: bool) -> int:
    """Whole weights at a time: of the two largest decoder layers, or of what lies outside of layers, which stays."""
    family, settings = forecast.model.family, forecast.settings
    layers: dict[str, int] = {}
    outside = 0
    for weight in forecast.weights:
        if weight.packed and not sharded_packed:
            continue
        size = weight.bytes(settings.dtype, settings.quantization)
        below = family.below_layer(weight.name) if family else None
        if below is None:
            outside += size
        else:
            layer = weight.name.removesuffix(below)
            layers[layer] = layers.get(layer, 0) + size
    return outside + sum(sorted(layers.values())[-2:])
