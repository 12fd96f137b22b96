"""The adapter that a recipe asks for, on top of those it is stacked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moeft.config.ranges import expand

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from moeft.config.sft import Lora
    from moeft.data.example import Example


def adapted(
    model: PreTrainedModel,
    lora: Lora,
    rows: Sequence[Example],
    metrics: dict[str, Any],
    show: Callable[[str], None],
) -> PeftModel:
    """Load the adapters below, choose experts, add the new adapter as ``default``.

    Args:
        model: The base.
        lora: The recipe's section.
        rows: Encoded training rows, for ``experts: routed``.
        metrics: Where the routing is kept, so that a second start chooses the same experts.
        show: Where to print the routing.
    """
    from moeft.integration.lora import add_lora, load_adapter

    base: Any = model
    for index, path in enumerate(lora.stack_on):
        base = load_adapter(base, path, name=f"below_{index}")
    return add_lora(
        base,
        lora.rank,
        lora.alpha,
        lora.targets,
        experts_rank=lora.experts_rank,
        ranks=lora.ranks,
        alphas=lora.alphas,
        rslora=lora.rslora,
        dropout=lora.dropout,
        layers=lora.layers,
        experts=_routed(base, lora, rows, metrics, show) if lora.experts == "routed" else lora.experts,
        seed=lora.init_seed,
        dtype=lora.dtype,
    )


def _routed(
    model: Any, lora: Lora, rows: Sequence[Example], metrics: dict[str, Any], show: Callable[[str], None]
) -> dict[int, tuple[int, ...]]:
    """Layer -> experts that the rows are routed to, of the layers to adapt."""
    from moeft.integration.routing_statistics import RoutingStatistics, routing_statistics

    if "routing" not in metrics:
        found = routing_statistics(model, (row["input_ids"].tolist() for row in rows), lora.routing.rows)
        by_layer = {str(layer): list(counts) for layer, counts in found.counts.items()}  # as JSON gives it back
        metrics["routing"] = {"rows": found.rows, "tokens": found.tokens, "counts": by_layer}
    kept = metrics["routing"]
    wanted = None if lora.layers is None else expand(lora.layers, "layers")
    counts = {int(layer): tuple(of_layer) for layer, of_layer in kept["counts"].items()}
    statistics = RoutingStatistics(
        kept["rows"], kept["tokens"], {layer: counts[layer] for layer in counts if wanted is None or layer in wanted}
    )
    show(f"experts that the training rows are routed to:\n{statistics.table(lora.routing.min_share)}")
    return statistics.routed(lora.routing.min_share)
