"""What would make a plan smaller, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeft.planning.adapters import HOST_OPTIMIZERS
from moeft.planning.settings import Settings
from moeft.planning.sizes import format_bytes
from moeft.planning.streaming import crossing_bytes, saved_bytes, solve


@dataclass(frozen=True)
class Knob:
    """One change and what it saves on the card.

    Attributes:
        name: What to change, as a recipe spells it.
        saves_bytes: How much smaller the card's total gets by this change alone.
        exists: Whether this version of moeft can do it.
        cost: What it costs.
    """

    name: str
    saves_bytes: int
    exists: bool = True
    cost: str = ""

    def __str__(self) -> str:
        missing = "" if self.exists else ", not in this version"
        return f"{format_bytes(self.saves_bytes):>11}  {self.name} ({self.cost}{missing})"


def changes(settings: Settings, packed_on_disk: bool) -> Iterator[tuple[str, Settings, str]]:
    """Name, changed settings and cost of everything that can be turned."""
    wanted = settings.quantization
    if wanted is not None:
        again = "pack the checkpoint again" if packed_on_disk else "a little more rounding"
        for key in ("experts", "double_quant", "attention", "mlp"):
            if not getattr(wanted, key):
                changed = replace(settings, quantization=wanted.model_copy(update={key: True}))
                yield f"quantization.{key}: true", changed, again
    if settings.checkpointing == "none":
        full = replace(settings, checkpointing="full")
        yield "training.gradient_checkpointing: true", full, "about a third slower"
        kept = replace(settings, checkpointing="keep_norm_inputs")
        yield "activation_checkpointing: keep_norm_inputs", kept, "recomputes less than full"
    if settings.batch_size > 1:
        half = replace(settings, batch_size=settings.batch_size // 2)
        yield f"training.per_device_train_batch_size: {half.batch_size}", half, "more accumulation for the same step"
    if settings.max_length > 512:
        half = replace(settings, max_length=settings.max_length // 2)
        yield f"data.max_length: {half.max_length}", half, "longer rows are rejected or cut"
    if settings.pairs is not None and settings.forward_batch_size > 1:
        half = replace(settings, forward_batch_size=settings.forward_batch_size // 2)
        name = f"training.per_device_eval_batch_size: {half.forward_batch_size}"
        yield name, half, "smaller passes over the reference"
    lora = settings.lora
    if lora.rank > 1:
        ranks = {"rank": lora.rank // 2, "experts_rank": lora.experts_rank and max(1, lora.experts_rank // 2)}
        yield f"lora.rank: {ranks['rank']}", replace(settings, lora=lora.model_copy(update=ranks)), "a smaller adapter"
    if "experts" in lora.targets and len(lora.targets) > 1:
        fewer = lora.model_copy(update={"targets": tuple(part for part in lora.targets if part != "experts")})
        yield f"lora.targets: [{', '.join(fewer.targets)}]", replace(settings, lora=fewer), "experts are not trained"
    if settings.optimizer not in HOST_OPTIMIZERS:
        if "8bit" not in settings.optimizer:
            small = replace(settings, optimizer="adamw_bnb_8bit")
            yield "training.optim: adamw_bnb_8bit", small, "needs bitsandbytes; moments in 8 bit"
        host = replace(settings, optimizer=HOST_OPTIMIZERS[0])
        yield f"training.optim: {HOST_OPTIMIZERS[0]}", host, "state in host memory, gradients cross the bus"


def streaming(expert_bytes_by_layer: list[int], device_bytes: int, vram_bytes: int) -> Knob | None:
    """Streaming as many layers' experts as it takes to fit a card; None if that is not enough."""
    resident = solve(expert_bytes_by_layer, device_bytes, vram_bytes) if expert_bytes_by_layer else None
    if resident is None:
        return None
    count, saved = len(expert_bytes_by_layer), saved_bytes(expert_bytes_by_layer, resident)
    crossing = crossing_bytes(expert_bytes_by_layer, resident)
    cost = f"{resident} of {count} layers stay; {format_bytes(crossing)} over the bus in a micro-batch"
    return Knob("memory.experts: stream", saved, True, cost) if saved > 0 else None
