"""Training on the CPU: memory of the host and predicted speed, beside the forecast for a card.

The Rust core restores weights in panels and works through experts in tasks of a few hundred rows, so what a card holds
of restored weights and gathered rows does not exist here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeft.planning import activations, pairs, transients
from moeft.planning.adapters import host_optimizer_bytes
from moeft.planning.layers import Layer, Traits
from moeft.planning.settings import Settings
from moeft.planning.sizes import format_bytes
from moeft.planning.speed import step_flops
from moeft.planning.weights import FLOAT_BYTES

# Assumed: Python after the imports of torch, transformers, PEFT and moeft (878 MiB, see docs/log.md).
PROCESS_BYTES = 900_000_000
# Assumed: what a whole step keeps of the 90 GFLOP/s that products reach on one AVX2 core, at hidden sizes from 1024.
FLOPS_PER_CORE = 40e9
TILE_BYTES = 16 << 20  # of a 16-bit head that is cast to float32 for its products
LOGIT_BUFFERS = 1


@dataclass(frozen=True)
class HostForecast:
    """Training on the CPU: predictions, not measurements.

    Attributes:
        tensor_bytes: Most bytes that tensors take at once.
        process_bytes: What the process is assumed to take besides.
        flops_per_step: Arithmetic of one micro-batch.
        tokens_per_second_per_core: At the assumed speed.
        flops_per_core: The assumption.
    """

    tensor_bytes: int
    process_bytes: int
    flops_per_step: float
    tokens_per_second_per_core: float
    flops_per_core: float

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of the process."""
        return self.tensor_bytes + self.process_bytes

    def __str__(self) -> str:
        return (
            f"on the CPU instead: {format_bytes(self.peak_bytes)} of host memory, "
            f"{format_bytes(self.process_bytes)} of it Python and its libraries, assumed; predicted, not measured: "
            f"{self.tokens_per_second_per_core:,.1f} tokens/s on each core at an assumed "
            f"{self.flops_per_core / 1e9:.0f} GFLOP/s"
        )


def forecast(
    layers: Sequence[Layer],
    traits: Traits,
    settings: Settings,
    resident_bytes: int,
    trained: tuple[int, int],
    head: tuple[int, int],
) -> HostForecast:
    """Memory and speed of training on the CPU.

    Args:
        layers: Decoder layers.
        traits: Traits of their family.
        settings: How the model is to be trained.
        resident_bytes: Model, adapter, gradients, and the subspace that is protected.
        trained: Parameters of adapters, and of the model itself, that train.
        head: Vocabulary and hidden size.
    """
    settings = replace(settings, fused_norms=False)
    vocabulary, hidden = head
    element = FLOAT_BYTES[settings.dtype]
    always = resident_bytes
    for parameters, dtype in zip(trained, (settings.adapter_dtype, settings.dtype), strict=True):
        always += host_optimizer_bytes(settings.optimizer, parameters, FLOAT_BYTES[dtype])
    always += activations.saved_bytes(layers, traits, settings) + transients.mask_bytes(layers, settings)
    rows = transients.loss_chunk_rows(vocabulary, settings)
    loss = 4 * LOGIT_BUFFERS * rows * vocabulary + (element + 4) * settings.tokens * hidden
    loss += activations.head_gradient_bytes(layers, settings)
    loss += pairs.answer_state_bytes(hidden, settings) if settings.pairs is not None else 0
    loss += min(TILE_BYTES, 4 * vocabulary * hidden) if settings.dtype != "float32" else 0
    backward = transients.expert_lora_bytes(layers, settings)
    if settings.dtype != settings.adapter_dtype:  # a low-rank update casts its layer's input and gradient
        widest = max((layer.query for layer in layers), default=0)
        backward += FLOAT_BYTES[settings.adapter_dtype] * settings.tokens * (hidden + widest)
    if settings.checkpointing != "none":
        backward += max(activations.recomputed_bytes(layer, traits, settings) for layer in layers)
    flops = step_flops(layers, vocabulary * hidden, settings)
    return HostForecast(
        tensor_bytes=always + max(loss, backward),
        process_bytes=PROCESS_BYTES,
        flops_per_step=flops,
        tokens_per_second_per_core=settings.tokens * FLOPS_PER_CORE / flops,
        flops_per_core=FLOPS_PER_CORE,
    )
