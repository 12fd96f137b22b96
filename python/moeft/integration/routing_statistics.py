"""Which experts a model sends rows of data to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeft import families
from moeft.errors import UnsupportedModelError
from moeft.integration import model_family

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RoutingStatistics:
    """How often each expert was chosen. ``str()`` is a table.

    Attributes:
        rows: Rows of data that were read.
        tokens: Their tokens.
        counts: Layer -> how many tokens chose each expert.
    """

    rows: int
    tokens: int
    counts: dict[int, tuple[int, ...]]

    def routed(self, min_share: float = 0.0) -> dict[int, tuple[int, ...]]:
        """Layer -> experts that the data is routed to, as ``moeft.add_lora(experts=...)`` takes them.

        Args:
            min_share: Leave out an expert that got less than this share of its layer's choices, 0 to 1. One that no
                token chose is always left out.

        Raises:
            ValueError: If the share is not in ``[0, 1)``, or leaves a layer without experts.
        """
        if not 0 <= min_share < 1:
            raise ValueError(f"min_share is {min_share}, expected a share from 0 to 1, such as 0.01")
        chosen = {}
        for layer, counts in self.counts.items():
            least = max(1.0, min_share * sum(counts))
            chosen[layer] = tuple(expert for expert, count in enumerate(counts) if count >= least)
            if not chosen[layer]:
                raise ValueError(
                    f"min_share is {min_share}, but no expert of layer {layer} got more than "
                    f"{max(counts) / max(1, sum(counts)):.4f} of the choices; choose a smaller share"
                )
        return chosen

    def table(self, min_share: float = 0.0) -> str:
        """One line per layer: experts chosen at ``min_share``, the share of choices they cover, the busiest expert."""
        lines = [f"{'layer':>5}{'experts':>9}{'chosen':>8}{'covered':>9}{'busiest':>9}{'its share':>11}"]
        for layer, chosen in self.routed(min_share).items():
            counts = self.counts[layer]
            total = sum(counts)
            busiest = max(range(len(counts)), key=counts.__getitem__)
            covered = sum(counts[expert] for expert in chosen) / total
            lines.append(
                f"{layer:>5}{len(counts):>9}{len(chosen):>8}{covered:>9.1%}{busiest:>9}{counts[busiest] / total:>11.1%}"
            )
        return "\n".join([*lines, f"{self.rows} rows, {self.tokens:,} tokens"])

    def __str__(self) -> str:
        return self.table()


def routing_statistics(
    model: PreTrainedModel | PeftModel, rows: Iterable[Sequence[int]], max_rows: int = 64
) -> RoutingStatistics:
    """Count which experts the tokens of some rows choose. One forward pass per row, no gradients.

    Args:
        model: A model of a known family, packed or not, with or without an adapter.
        rows: Token ids of each row.
        max_rows: Read no more rows than this.

    Raises:
        ValueError: If ``max_rows`` is not positive or there are no rows.
        UnsupportedModelError: If the model has no experts.
    """
    if max_rows <= 0:
        raise ValueError(f"max_rows is {max_rows}, expected a positive number")
    counts: dict[int, Tensor] = {}
    sizes = {layer: num_experts for layer, num_experts, _ in _experts(model, model_family.of_model(model))}

    def count(layer: int, chosen_Tk: Tensor) -> None:
        counts[layer] = counts.get(layer, 0) + torch.bincount(chosen_Tk.flatten().long(), minlength=sizes[layer]).cpu()

    read, tokens = each_choice(model, islice(rows, max_rows), count)
    return RoutingStatistics(read, tokens, {layer: tuple(counts[layer].tolist()) for layer in sorted(counts)})


@torch.no_grad()
def each_choice(
    model: PreTrainedModel | PeftModel, rows: Iterable[Sequence[int]], take: Callable[[int, Tensor], None]
) -> tuple[int, int]:
    """Run rows through a model, one forward pass each, and pass on what its routers choose.

    Args:
        model: A model of a known family, packed or not, with or without an adapter.
        rows: Token ids of each row.
        take: Called with the layer and the experts ``[T, k]`` of every token of a row.

    Returns:
        Rows and tokens.

    Raises:
        ValueError: If there are no rows.
        UnsupportedModelError: If the model has no experts.
    """
    family = model_family.of_model(model)
    hooks = [
        module.register_forward_pre_hook(_hook(layer, take), with_kwargs=True)
        for layer, _, module in _experts(model, family)
    ]
    if not hooks:
        raise UnsupportedModelError(f"this {family.name} model has no layer with experts, so nothing is routed")
    training = model.training
    model.eval()
    read = tokens = 0
    try:
        for row in rows:
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=1)
            read, tokens = read + 1, tokens + len(row)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not read:
        raise ValueError("there are no rows to count the routing of")
    return read, tokens


def _experts(model: nn.Module, family: families.Family) -> Iterable[tuple[int, int, nn.Module]]:
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if family.experts and family.below_layer(name) == family.experts and not hasattr(module, "base_layer"):
            experts: Any = module
            yield int(name.removesuffix(f".{family.experts}").rpartition(".")[2]), experts.num_experts, module


def _hook(layer: int, take: Callable[[int, Tensor], None]) -> Any:
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(layer, args[1] if len(args) > 1 else kwargs["top_k_index"])

    return look
