"""Predicted speed of a training step: the larger of arithmetic and memory traffic, against a card's peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeft.planning.devices import Device
from moeft.planning.layers import Layer
from moeft.planning.settings import Settings
from moeft.planning.weights import FLOAT_BYTES, Weight

ASSUMED_UTILISATION = 0.25  # of the peak; the best public figures for these models lie between 0.1 and 0.4


@dataclass(frozen=True)
class Speed:
    """A prediction, not a measurement.

    Attributes:
        device: The card.
        flops_per_step: Arithmetic of one micro-batch, forward, recompute and backward.
        bytes_per_step: Traffic of weights in one micro-batch.
        ceiling_tokens_per_second: At the card's peak.
        tokens_per_second: At the assumed utilisation.
        utilisation: The assumption.
        bound: What limits the ceiling: "arithmetic" or "memory traffic".
    """

    device: str
    flops_per_step: float
    bytes_per_step: float
    ceiling_tokens_per_second: float
    tokens_per_second: float
    utilisation: float
    bound: str

    def __str__(self) -> str:
        return (
            f"predicted, not measured: {self.tokens_per_second:,.0f} tokens/s on {self.device} at an assumed "
            f"{self.utilisation:.0%} of its peak; ceiling {self.ceiling_tokens_per_second:,.0f}, bound by {self.bound} "
            f"({self.flops_per_step / 1e12:.1f} TFLOP and {self.bytes_per_step / 1e9:.1f} GB of weights a micro-batch)"
        )


def predict(
    device: Device, layers: Sequence[Layer], weights: Sequence[Weight], head_parameters: int, settings: Settings
) -> Speed:
    """Speed of training this model on a card."""
    flops = step_flops(layers, head_parameters, settings)
    traffic = step_bytes(weights, head_parameters, settings)
    compute_seconds, memory_seconds = flops / device.flops, traffic / device.bandwidth
    ceiling = settings.tokens / max(compute_seconds, memory_seconds)
    return Speed(
        device=device.name,
        flops_per_step=flops,
        bytes_per_step=traffic,
        ceiling_tokens_per_second=ceiling,
        tokens_per_second=ceiling * ASSUMED_UTILISATION,
        utilisation=ASSUMED_UTILISATION,
        bound="arithmetic" if compute_seconds >= memory_seconds else "memory traffic",
    )


def step_flops(layers: Sequence[Layer], head_parameters: int, settings: Settings) -> float:
    """Arithmetic of a micro-batch of full rows, every token counted in the loss.

    Frozen weights get no gradient, so backward costs as much as forward, and recomputation once more. Attention's
    backward is 2.5 times its forward. The head's gradient is formed in its forward pass. LoRA adds about 1 % and is
    left out.
    """
    recomputed = 0 if settings.checkpointing == "none" else 1
    total = 0.0
    for layer in layers:
        active = layer.parameters + layer.top_k * 3 * layer.hidden * layer.expert
        scores = 4 * layer.query * _mean_context(settings.max_length, layer.window)
        total += 2 * active * (2 + recomputed) + scores * (3.5 + recomputed)
    return settings.tokens * (total + 2 * head_parameters * 2)


def step_bytes(weights: Sequence[Weight], head_parameters: int, settings: Settings) -> float:
    """Traffic of weights: each pass reads them; packed ones are read, written restored, and read again."""
    element = FLOAT_BYTES[settings.dtype]
    passes = 2 if settings.checkpointing == "none" else 3
    per_pass = 0.0
    for weight in weights:
        if weight.component in ("experts", "attention", "mlp"):
            per_pass += weight.parameters * (0.5625 + 2 * element if weight.packed else element)
    return passes * per_pass + 2 * element * head_parameters


def _mean_context(length: int, window: int | None) -> float:
    if window is None or length <= window:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
