"""From a model's shapes and a recipe to the forecast of every byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeft.config.sft import Lora, SftRecipe
from moeft.errors import CheckpointError
from moeft.families import Family
from moeft.planning import activations, transients
from moeft.planning.adapters import adapter_parameters, optimizer_bytes, rank_of
from moeft.planning.advice import Knob, changes, exists, streaming
from moeft.planning.devices import find_device, nearest_names
from moeft.planning.layers import Layer, decoder_layers, traits_of
from moeft.planning.model import Model, read_model
from moeft.planning.report import LAYER_BACKWARD, LOSS_HEAD, WEIGHTS, Plan, PlanRow
from moeft.planning.settings import Settings, read_settings
from moeft.planning.shapes import LAYERS
from moeft.planning.sizes import format_bytes, parse_bytes
from moeft.planning.speed import Speed, predict
from moeft.planning.weights import FLOAT_BYTES, Weight, with_packing

# Assumed, not derived: what a CUDA context takes differs by driver and card, fragmentation by the order of requests.
CONTEXT_BYTES = 450_000_000
FRAGMENTATION_BYTES = 300_000_000


def plan(
    model: Any,
    vram: str | int | None = None,
    recipe: str | Path | SftRecipe | Settings | None = None,
    device: str | None = None,
) -> Plan:
    """Forecast the memory and speed of training, from config and headers; reads no weights and needs no torch.

    Args:
        model: Folder of a checkpoint, 16-bit or packed; a ``config.json``; its content; or a config of transformers.
        vram: Memory of the card, such as ``"16GiB"``; by default that of ``device``.
        recipe: Recipe of ``moeft sft``, or settings. Without one: NF4 experts, LoRA of rank 16 on attention and
            experts, one row of 2,048 tokens, full activation checkpointing.
        device: Name of a card for a prediction of speed, such as ``"RTX 3090"``.

    Raises:
        FileNotFoundError: If there is no such folder, or no config in it.
        CheckpointError: If config or headers are damaged, or the checkpoint is packed in another way than asked.
        UnsupportedModelError: If the family is unknown and there are no headers.
        RecipeError: If the recipe cannot be read, or is of another kind.
        ValueError: If ``vram`` is no size.
    """
    card = find_device(device) if device else None
    vram_bytes = card.memory_bytes if vram is None and card else None if vram is None else parse_bytes(vram)
    found = read_model(model)
    settings, notes = _resolve(found, read_settings(recipe), given=recipe is not None)
    forecast = _Forecast(found, settings)
    if device and card is None:
        notes.append(
            f"no speed is predicted: {device!r} is not in the table of cards; near it are "
            f"{', '.join(nearest_names(device))}"
        )
    result = forecast.plan(vram_bytes, forecast.speed(card) if card else None, notes)
    return replace(result, advice=tuple(_advice(forecast, result)))


class _Forecast:
    """All figures of one model under one set of settings."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        family, quantization = model.family, settings.quantization
        weights = model.weights
        if settings.text_only and family is not None and family.text_class:
            weights = tuple(weight for weight in weights if weight.component != "towers")
        if family is not None and quantization is not None:
            weights = tuple(with_packing(weights, family, quantization))
        self.weights = weights
        self.layers: list[Layer] = [] if family is None else decoder_layers(weights, family, model.config)
        vocabulary = max(
            (w.shape for w in weights if w.component == "embeddings" and len(w.shape) == 2), default=(0, 0)
        )
        self.vocabulary, self.hidden = vocabulary

    def plan(self, vram_bytes: int | None, speed: Speed | None, notes: list[str]) -> Plan:
        rows = [*self.weight_rows(), *self.adapter_rows(), *self.step_rows()]
        return Plan(
            self.model.name,
            tuple(rows),
            FRAGMENTATION_BYTES,
            CONTEXT_BYTES,
            vram_bytes,
            speed=speed,
            notes=tuple(notes),
        )

    def weight_rows(self) -> Iterator[PlanRow]:
        """Rows of the model as it is loaded."""
        settings = self.settings
        totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for weight in self.weights:
            total = totals[weight.component, self.dtype_of(weight)]
            total[0] += weight.parameters
            total[1] += weight.bytes(settings.dtype, settings.quantization)
        for (component, dtype), (parameters, size) in sorted(
            totals.items(), key=lambda item: WEIGHTS.index(item[0][0])
        ):
            yield PlanRow(component, dtype, size, f"shapes from {self.model.source}", parameters=parameters)
        left_out = [weight for weight in self.model.weights if weight.component == "towers"]
        if left_out and not any(weight.component == "towers" for weight in self.weights):
            size = sum(weight.bytes(settings.dtype, None) for weight in left_out)
            yield PlanRow("towers", "-", 0, f"text-only loading leaves out {format_bytes(size)} of other modalities")

    def dtype_of(self, weight: Weight) -> str:
        if weight.fixed_bytes is not None:
            return "as stored"
        if not weight.packed or self.settings.quantization is None:
            return self.settings.dtype
        return "nf4 double quant" if self.settings.quantization.double_quant else "nf4"

    def adapter_rows(self) -> Iterator[PlanRow]:
        """Rows of what is trained."""
        family, settings = self.model.family, self.settings
        if family is None:
            return
        found = adapter_parameters(self.weights, family, settings.lora)
        dtype, size = settings.adapter_dtype, FLOAT_BYTES[settings.adapter_dtype]
        for target, count in found.items():
            yield PlanRow(
                f"adapter {target}",
                dtype,
                count * size,
                _ranks(target, settings.lora),
                parameters=count,
            )
        trained = sum(found.values())
        yield PlanRow("gradients", dtype, trained * size, f"of {trained:,} trained parameters")
        per_parameter, source = optimizer_bytes(settings.optimizer)
        yield PlanRow("optimizer state", settings.optimizer, round(trained * per_parameter), source)

    def step_rows(self) -> Iterator[PlanRow]:
        """Rows of what a micro-batch needs."""
        if not self.layers or self.model.family is None:
            return
        settings, layers, dtype = self.settings, self.layers, self.settings.dtype
        traits = traits_of(self.model.family)
        shape = f"{settings.batch_size} x {settings.max_length} tokens"

        def estimate(component: str, size: int, source: str, **options: Any) -> PlanRow:
            return PlanRow(component, dtype, size, source, exact=False, **options)

        saved = activations.saved_bytes(layers, traits, settings)
        yield estimate("activations", saved, f"{shape}, checkpointing {settings.checkpointing}")
        yield estimate("attention masks", transients.mask_bytes(layers, settings), "one byte per pair of tokens")
        softcap = bool(self.model.config.get("final_logit_softcapping"))
        head = transients.loss_head_bytes(self.vocabulary, self.hidden, softcap, settings)
        rows = min(transients.LOSS_CHUNK_ROWS, settings.tokens)
        yield estimate("loss chunk", head, f"{rows} rows of {self.vocabulary:,} logits", phase=LOSS_HEAD)
        gradient = activations.head_gradient_bytes(layers, settings)
        yield estimate("loss gradient", gradient, "hidden states of the rows that count", phase=LOSS_HEAD)
        backward = {"phase": LAYER_BACKWARD}
        if settings.checkpointing != "none":
            largest = max(activations.recomputed_bytes(layer, traits, settings) for layer in layers)
            yield estimate("recomputed layer", largest, "activations of the largest layer", **backward)
        packed_experts = settings.quantization is not None and settings.quantization.experts
        if packed_experts:
            size = transients.expert_backward_bytes(layers, settings)
            yield estimate("expert rows", size, "routed rows and their gradients in one layer", **backward)
            size = transients.expert_lora_bytes(layers, settings)
            yield estimate("expert LoRA temporaries", size, "factors and gradients of one layer", **backward)
        elif "experts" in settings.lora.targets:
            size = 2 * max(_expert_bytes(self), default=0)
            yield estimate("expert LoRA temporaries", size, "PEFT forms W + BA of 16-bit experts", **backward)
        workspace = transients.workspace_bytes(self.weights, settings.quantization, settings)
        yield estimate("dequantise workspace", workspace, "packed weights, restored in parts", **backward)

    def speed(self, card: Any) -> Speed | None:
        """Speed on a card; None for a model whose layers are not understood."""
        if not self.layers:
            return None
        return predict(card, self.layers, self.weights, self.vocabulary * self.hidden, self.settings)


def _resolve(model: Model, settings: Settings, *, given: bool) -> tuple[Settings, list[str]]:
    """Settings that this model can have, and what the reader must know."""
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
        notes.append("activations: rows as long as data.max_length, scaled-dot-product attention, no dropout")
    notes += _not_counted(settings)
    if model.family.name not in LAYERS:
        notes.append(f"plans of {model.family.name} models were not compared with loaded ones")
    notes.append(
        f"assumed, not derived: {format_bytes(FRAGMENTATION_BYTES)} of fragmentation, {format_bytes(CONTEXT_BYTES)} of "
        "CUDA context"
    )
    return settings, notes


def _advice(forecast: _Forecast, result: Plan) -> Iterator[Knob]:
    """Knobs that save something, largest saving first; streaming last, if nothing else makes it fit."""
    if forecast.model.family is None:
        return
    knobs = []
    for name, changed, cost in changes(forecast.settings, forecast.model.packing is not None):
        other = _Forecast(forecast.model, changed).plan(None, None, [])
        saved = result.device_bytes - other.device_bytes
        if saved > 0:
            knobs.append(Knob(name, saved, exists(name), cost))
    yield from sorted(knobs, key=lambda knob: -knob.saves_bytes)
    if result.fits is False and result.vram_bytes is not None:
        knob = streaming(_expert_bytes(forecast), result.device_bytes, result.vram_bytes)
        if knob is not None:
            yield knob


def _expert_bytes(forecast: _Forecast) -> list[int]:
    """Bytes of the experts of each layer that has some."""
    family: Family | None = forecast.model.family
    totals: dict[str, int] = defaultdict(int)
    for weight in forecast.weights:
        below = family.below_layer(weight.name) if family else None
        if below is not None and weight.component == "experts":
            totals[weight.name.removesuffix(below)] += weight.bytes(
                forecast.settings.dtype, forecast.settings.quantization
            )
    return list(totals.values())


def _ranks(target: str, lora: Lora) -> str:
    return f"rank {rank_of(lora, target)}" + (" on every expert" if target == "experts" else "")


def _not_counted(settings: Settings) -> Iterator[str]:
    """Keys of a recipe that make a run smaller and that this forecast takes no account of."""
    for key, everything in (("layers", None), ("experts", "all")):
        if getattr(settings.lora, key, everything) != everything:
            yield f"lora.{key} is not counted: the adapter is planned for all"
    if getattr(settings.lora, "stack_on", ()):
        yield "lora.stack_on is not counted: adapters below the new one come on top of this plan"
    if settings.offload:
        yield "activation_offload is not counted: activations are planned on the card"
