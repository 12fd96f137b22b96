"""Every row of a plan, for one model under one set of settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from moeft.config.sft import Lora
from moeft.planning import activations, host, pairs, transients
from moeft.planning.adapters import adapter_parameters, optimizer_bytes, rank_of, subspace_bytes
from moeft.planning.devices import Device
from moeft.planning.layers import Layer, decoder_layers, traits_of
from moeft.planning.model import Model
from moeft.planning.report import ALWAYS, FORWARD_PASS, LAYER_BACKWARD, LOSS_HEAD, WEIGHTS, Plan, PlanRow
from moeft.planning.settings import Settings
from moeft.planning.sizes import format_bytes
from moeft.planning.speed import Speed, predict
from moeft.planning.weights import FLOAT_BYTES, Weight, with_packing

# Assumed, not derived: what a CUDA context takes differs by driver and card, fragmentation by the order of requests.
CONTEXT_BYTES = 450_000_000
FRAGMENTATION_BYTES = 300_000_000


class Forecast:
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
        heads = [weight.shape for weight in weights if weight.name.endswith(("embed_tokens.weight", "lm_head.weight"))]
        self.vocabulary, self.hidden = heads[0] if heads else (0, 0)

    def plan(self, vram_bytes: int | None = None, speed: Speed | None = None, notes: Sequence[str] = ()) -> Plan:
        """The plan, without advice."""
        rows = [*self.weight_rows(), *self.adapter_rows(), *self.step_rows()]
        rows += self.pass_without_gradients(rows)
        return Plan(
            self.model.name,
            tuple(rows),
            FRAGMENTATION_BYTES,
            CONTEXT_BYTES,
            vram_bytes,
            speed=speed,
            host=self.host(rows),
            notes=tuple(notes),
        )

    def host(self, rows: Sequence[PlanRow]) -> host.HostForecast | None:
        """Training on the CPU; None for a model whose layers are not understood."""
        if not self.layers or self.model.family is None:
            return None
        adapter = [row for row in rows if row.component.startswith("adapter ")]
        kept = (*WEIGHTS, "gradients", "gradients in full", "instruct subspace")
        resident = sum(row.bytes for row in rows if row.component in kept)
        return host.forecast(
            self.layers,
            traits_of(self.model.family),
            self.settings,
            resident + sum(row.bytes for row in adapter),
            (sum(row.parameters for row in adapter), self.trained_parameters()),
            (self.vocabulary, self.hidden),
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
        """How a weight is held, in words."""
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
        adapted = sum(found.values())
        if adapted:
            yield PlanRow("gradients", dtype, adapted * size, f"of {adapted:,} parameters of adapters")
        own, element = self.trained_parameters(), FLOAT_BYTES[settings.dtype]
        if own:
            source = f"of {own:,} parameters of {', '.join(settings.train)}, trained in full"
            yield PlanRow("gradients in full", settings.dtype, own * element, source)
        per_parameter, source = optimizer_bytes(settings.optimizer)
        yield PlanRow("optimizer state", settings.optimizer, round((adapted + own) * per_parameter), source)
        if settings.protected_rank is not None:
            trained = {*settings.lora.targets, *settings.train}
            size = subspace_bytes(self.weights, family, trained, settings.protected_rank)
            source = f"U and V of rank {settings.protected_rank} for every matrix that trains"
            yield PlanRow("instruct subspace", "float32", size, source)

    def trained_parameters(self) -> int:
        """Parameters of the model itself that train."""
        return sum(weight.parameters for weight in self.weights if weight.component in self.settings.train)

    def step_rows(self) -> Iterator[PlanRow]:
        """Rows of what a micro-batch needs."""
        if not self.layers or self.model.family is None:
            return
        settings, layers, dtype = self.settings, self.layers, self.settings.dtype
        traits = traits_of(self.model.family)
        shape = f"{settings.rows} x {settings.row_tokens} tokens"

        def estimate(component: str, size: int, source: str, **options: Any) -> PlanRow:
            return PlanRow(component, dtype, size, source, exact=False, **options)

        saved = activations.saved_bytes(layers, traits, settings)
        yield estimate("activations", saved, f"{shape}, checkpointing {settings.checkpointing}")
        yield estimate("attention masks", transients.mask_bytes(layers, settings), "one byte per pair of tokens")
        head = transients.loss_head_bytes(self.vocabulary, self.hidden, settings)
        rows = transients.loss_chunk_rows(self.vocabulary, settings)
        yield estimate("loss chunk", head, f"{rows} rows of {self.vocabulary:,} logits", phase=LOSS_HEAD)
        if settings.pairs is not None:
            size = pairs.answer_state_bytes(self.hidden, settings)
            yield estimate("answer states", size, "before compared tokens of both answers", phase=LOSS_HEAD)
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
            size = 2 * max(self.expert_bytes(), default=0)
            yield estimate("expert LoRA temporaries", size, "PEFT forms W + BA of 16-bit experts", **backward)
        workspace = transients.workspace_bytes(self.weights, settings.quantization, settings)
        yield estimate("dequantise workspace", workspace, "packed weights, restored in parts", **backward)

    def pass_without_gradients(self, rows: Sequence[PlanRow]) -> Iterator[PlanRow]:
        """What the reference and held-out pairs take beyond what is there in all of training.

        The reference is taken before training, so nothing but weights and adapter is there yet.
        """
        settings = self.settings
        if settings.pairs is None or not self.layers or self.model.family is None:
            return
        workspace = transients.workspace_bytes(self.weights, settings.quantization, settings)
        size = pairs.forward_pass_bytes(self.layers, traits_of(self.model.family), self.vocabulary, workspace, settings)
        of_training = sum(row.bytes for row in rows if row.phase == ALWAYS and not _is_resident(row))
        source = f"{format_bytes(size)} for {settings.forward_batch_size} pairs at a time, less what training keeps"
        beyond = max(0, size - of_training)
        yield PlanRow("reference and held-out", settings.dtype, beyond, source, FORWARD_PASS, exact=False)

    def expert_bytes(self, packed_only: bool = False) -> list[int]:
        """Bytes of the experts of each layer that has some; with ``packed_only``, of their packed stacks alone."""
        family, settings = self.model.family, self.settings
        totals: dict[str, int] = defaultdict(int)
        for weight in self.weights:
            below = family.below_layer(weight.name) if family else None
            if below is not None and weight.component == "experts" and (weight.packed or not packed_only):
                totals[weight.name.removesuffix(below)] += weight.bytes(settings.dtype, settings.quantization)
        return list(totals.values())

    def speed(self, card: Device) -> Speed | None:
        """Speed on a card; None for a model whose layers are not understood."""
        if not self.layers:
            return None
        return predict(card, self.layers, self.weights, self.vocabulary * self.hidden, self.settings)


def _is_resident(row: PlanRow) -> bool:
    """Whether a row is of weights, which are there before training."""
    return row.component in WEIGHTS or row.component.startswith("adapter ")


def _ranks(target: str, lora: Lora) -> str:
    return f"rank {rank_of(lora, target)}" + (" on every expert" if target == "experts" else "")
