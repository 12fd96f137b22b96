"""From a model and a recipe to the forecast, with what would change it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeft.config.dpo import DpoRecipe
from moeft.config.sft import SftRecipe
from moeft.planning.advice import Knob, changes, streaming
from moeft.planning.devices import Device, find_device, nearest_names
from moeft.planning.model import read_model
from moeft.planning.report import Plan
from moeft.planning.resolve import resolve
from moeft.planning.rows import Forecast
from moeft.planning.settings import Settings, read_settings
from moeft.planning.sizes import parse_bytes
from moeft.planning.spread import spread
from moeft.planning.streaming import solve, stream


def plan(
    model: Any,
    vram: str | int | None = None,
    recipe: str | Path | SftRecipe | DpoRecipe | Settings | None = None,
    device: str | None = None,
    gpus: int = 1,
    strategy: str = "ddp",
) -> Plan:
    """Forecast the memory and speed of training, from config and headers; reads no weights and needs no torch.

    Args:
        model: Folder of a checkpoint, 16-bit or packed; a ``config.json``; its content; or a config of transformers.
        vram: Memory of the card, such as ``"16GiB"``; by default what the recipe says, or that of ``device``.
        recipe: Recipe of ``moeft sft`` or ``moeft dpo``, or settings. Without one: NF4 experts, LoRA of rank 16 on
            attention and experts, one row of 2,048 tokens, full activation checkpointing.
        device: Name of a card for a prediction of speed, such as ``"RTX 3090"``.
        gpus: GPUs that share the run; rows of the recipe are those of one.
        strategy: How they share it: "ddp", "fsdp" or "zero3".

    Raises:
        FileNotFoundError: If there is no such folder, or no config in it.
        CheckpointError: If config or headers are damaged, or the checkpoint is packed in another way than asked.
        UnsupportedModelError: If the family is unknown and there are no headers.
        RecipeError: If the recipe cannot be read, or is of another kind.
        ValueError: If ``vram`` is no size, ``gpus`` not positive or ``strategy`` unknown, or several GPUs are to stream
            experts.
    """
    card = find_device(device) if device else None
    asked = read_settings(recipe)
    if gpus > 1 and asked.memory.experts != "resident":
        raise ValueError(f"memory.experts is {asked.memory.experts!r}, expected 'resident' on {gpus} GPUs")
    size = asked.memory.vram if vram is None else vram
    vram_bytes = parse_bytes(size) if size is not None else None if card is None else card.memory_bytes
    found = read_model(model)
    settings, notes = resolve(found, asked, given=recipe is not None)
    settings = replace(settings, card_bytes=vram_bytes)
    forecast = Forecast(found, settings)
    if device and card is None:
        notes.append(
            f"no speed is predicted: {device!r} is not in the table of cards; near it are "
            f"{', '.join(nearest_names(device))}"
        )
    result = forecast.plan(vram_bytes, forecast.speed(card) if card else None, notes)
    shared = spread(forecast, result, gpus, strategy)
    result = replace(result, advice=tuple(_advice(forecast, result)), spread=shared if gpus > 1 else None)
    return _streamed(forecast, result, card)


def _streamed(forecast: Forecast, result: Plan, card: Device | None) -> Plan:
    """The plan with experts streamed, if they are to be."""
    settings, expert_bytes = forecast.settings, forecast.expert_bytes(packed_only=True)
    wanted = settings.memory.experts
    if wanted == "resident" or (wanted == "auto" and result.fits is not False):
        return result
    if not expert_bytes:
        note = f"memory.experts is {wanted!r}, which streams packed experts, and this model has none"
        return replace(result, notes=(*result.notes, note))
    resident = solve(expert_bytes, result.device_bytes, result.vram_bytes)

    def seconds_of(rows: int) -> float | None:
        changed = replace(settings, batch_size=rows)
        speed = None if card is None else Forecast(forecast.model, changed).speed(card)
        return None if speed is None else changed.tokens / speed.ceiling_tokens_per_second

    return stream(
        result,
        expert_bytes,
        resident or 0,
        on_disk=settings.memory.backing == "disk",
        rows=settings.batch_size,
        length=settings.max_length,
        bus=None if card is None else card.bus,
        seconds_of=seconds_of,
    )


def _advice(forecast: Forecast, result: Plan) -> Iterator[Knob]:
    """Knobs that save something, largest saving first; streaming last, if nothing else makes it fit."""
    if forecast.model.family is None:
        return
    knobs = []
    for name, changed, cost in changes(forecast.settings, forecast.model.packing is not None):
        other = Forecast(forecast.model, changed).plan()
        saved = result.device_bytes - other.device_bytes
        if saved > 0:
            knobs.append(Knob(name, saved, True, cost))
    yield from sorted(knobs, key=lambda knob: -knob.saves_bytes)
    is_resident = forecast.settings.memory.experts == "resident"
    if is_resident and result.fits is False and result.vram_bytes is not None:
        knob = streaming(forecast.expert_bytes(packed_only=True), result.device_bytes, result.vram_bytes)
        if knob is not None:
            yield knob
