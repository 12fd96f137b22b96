"""What a model can have of what a recipe asks for, and what the reader of a plan must know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moeft.errors import CheckpointError
from moeft.planning.layers import decoder_layers
from moeft.planning.model import Model
from moeft.planning.rows import CONTEXT_BYTES, FRAGMENTATION_BYTES
from moeft.planning.settings import Settings
from moeft.planning.shapes import LAYERS
from moeft.planning.sizes import format_bytes


def resolve(model: Model, settings: Settings, *, given: bool) -> tuple[Settings, list[str]]:
    """Settings that this model can have, and notes.

    Args:
        model: The model.
        settings: What is asked for.
        given: Whether a user asked for it; what a default asks for and the model lacks is dropped without a word.

    Raises:
        CheckpointError: If the checkpoint is packed in another way than asked.
    """
    notes = list(model.notes)
    if model.packing is not None:
        if given and settings.quantization not in (None, model.packing):
            raise CheckpointError(
                f"{model.name} is already packed, in another way than the recipe asks for; set quantization to null, "
                "or plan for the 16-bit checkpoint"
            )
        settings = replace(settings, quantization=model.packing)
    if model.family is None:
        return replace(settings, quantization=None), notes
    present = {weight.component for weight in model.weights}
    wanted = settings.quantization
    if wanted is not None and wanted.experts and "experts" not in present:
        if given:
            notes.append("the recipe packs experts, and this model has none: loading will refuse it")
        else:
            settings = replace(settings, quantization=wanted.model_copy(update={"experts": False}))
    missing = [target for target in settings.lora.targets if target not in present]
    if missing:
        if given:
            notes.append(f"lora.targets names {', '.join(missing)}, which this model lacks: adding LoRA will refuse it")
        targets = tuple(target for target in settings.lora.targets if target not in missing)
        settings = replace(settings, lora=settings.lora.model_copy(update={"targets": targets}))
    if not decoder_layers(model.weights, model.family, model.config):
        notes.append("layers of another kind than attention: activations, workspaces and speed are left out")
    else:
        lengths = "rows as long as data.max_length"
        if settings.pairs is not None:
            lengths = "both sequences of a pair as long as data.max_length, a shared prompt counted twice"
        notes.append(f"activations: {lengths}, scaled-dot-product attention, no dropout")
    notes += _not_counted(settings)
    if model.family.name not in LAYERS:
        notes.append(f"plans of {model.family.name} models were not compared with loaded ones")
    notes.append(
        f"assumed, not derived: {format_bytes(FRAGMENTATION_BYTES)} of fragmentation, {format_bytes(CONTEXT_BYTES)} of "
        "CUDA context"
    )
    return settings, notes


def _not_counted(settings: Settings) -> Iterator[str]:
    """What a recipe asks for and this forecast takes no account of."""
    for key, everything in (("layers", None), ("experts", "all")):
        if getattr(settings.lora, key, everything) != everything:
            yield f"lora.{key} is not counted: the adapter is planned for all"
    if getattr(settings.lora, "stack_on", ()):
        yield "lora.stack_on is not counted: adapters below the new one come on top of this plan"
    if settings.train:
        yield "inputs that layers trained in full keep for their gradients are not counted, nor the time for these"
    if settings.offload:
        yield "activation_offload is not counted: activations are planned on the card"
    if settings.pairs is not None:
        yield (
            f"on the CPU, the pass without gradients over {settings.forward_batch_size} pairs is not counted; it may "
            "decide the peak where these are many times the pairs of a training batch"
        )
