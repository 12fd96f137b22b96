"""The dimensions of every decoder layer, read off its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeft.families import Family
from moeft.planning.weights import STACKS, Weight


@dataclass(frozen=True)
class Traits:
    """What weights do not show: computation without weights of its own.

    Attributes:
        value_norm: Values are normalised too.
        router_norm: The router normalises its input.
        parallel_experts: Experts, router and dense block stand side by side in the layer, not in one block.
        shared_norm_inputs: Norms of a layer that read a tensor which another norm of it reads as well.
        norm_statistics: Values kept per normalised row: Gemma 4 keeps the power and its argument.
    """

    value_norm: bool = False
    router_norm: bool = False
    parallel_experts: bool = False
    shared_norm_inputs: int = 0
    norm_statistics: int = 1


TRAITS = {
    "gemma4": Traits(value_norm=True, router_norm=True, parallel_experts=True, shared_norm_inputs=1, norm_statistics=2)
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Widths are in elements; a part that the layer lacks has width 0.

    Attributes:
        query: Width of all query heads.
        key: Width of all key heads.
        value_projection: Whether values have a projection of their own, or are the keys.
        head_dim: Width of one head.
        heads: Query heads.
        qk_norm_rows: Rows per token that the norms of queries and keys see, together; 0 without such norms.
        norms: Norms over the hidden width.
        mlp: Inner width of dense feed-forward blocks, shared experts included.
        experts: Number of experts.
        expert: Inner width of an expert.
        top_k: Experts per token.
        window: Attention window in tokens; None for full attention.
        parameters: Elements of the linear layers that every token goes through, without experts.
    """

    hidden: int
    query: int
    key: int
    value_projection: bool
    head_dim: int
    heads: int
    qk_norm_rows: int
    norms: int
    mlp: int
    experts: int
    expert: int
    top_k: int
    window: int | None
    parameters: int


def traits_of(family: Family) -> Traits:
    """Traits of a family."""
    return TRAITS.get(family.name, Traits())


def decoder_layers(weights: Sequence[Weight], family: Family, config: Mapping[str, Any]) -> list[Layer]:
    """Dimensions of all decoder layers, in order; empty if they are not attention plus feed-forward."""
    by_layer: dict[int, dict[str, Weight]] = defaultdict(dict)
    for weight in weights:
        below = family.below_layer(weight.name)
        if below is not None:
            index = int(weight.name.removesuffix(below).rstrip(".").rpartition(".")[2])
            by_layer[index][below] = weight
    layers = [_layer(index, by_layer[index], family, config) for index in sorted(by_layer)]
    return [] if None in layers else [layer for layer in layers if layer is not None]


def _layer(index: int, found: Mapping[str, Weight], family: Family, config: Mapping[str, Any]) -> Layer | None:
    query = found.get("self_attn.q_proj.weight")
    key = found.get("self_attn.k_proj.weight")
    if query is None or key is None:
        return None
    query_width, hidden = query.shape
    key_width = key.shape[0]
    heads = int(config.get("num_attention_heads") or 0)
    if not heads:
        return None
    head_dim = query_width // heads
    norms = [
        (width, found.get(f"self_attn.{part}_norm.weight")) for part, width in (("q", query_width), ("k", key_width))
    ]
    norm_rows = sum(width // norm.shape[0] for width, norm in norms if norm is not None)
    stack = found.get(f"{family.experts}.{STACKS[0]}")
    experts = 0 if stack is None else stack.shape[0]
    dense = [w for name, w in found.items() if name.endswith("up_proj.weight") and w.component != "experts"]
    linears = [w for name, w in found.items() if len(w.shape) == 2 and w.component in ("attention", "mlp", "router")]
    return Layer(
        hidden=hidden,
        query=query_width,
        key=key_width,
        value_projection="self_attn.v_proj.weight" in found,
        head_dim=head_dim,
        heads=heads,
        qk_norm_rows=norm_rows,
        norms=sum(w.component == "norms" and w.shape == (hidden,) and "attn." not in name for name, w in found.items()),
        mlp=sum(weight.shape[0] for weight in dense),
        experts=experts,
        expert=0 if stack is None else stack.elements // (2 * hidden * experts),
        top_k=int(config.get("num_experts_per_tok") or config.get("top_k_experts") or 0) if stack else 0,
        window=_window(index, config),
        parameters=sum(weight.parameters for weight in linears),
    )


def _window(index: int, config: Mapping[str, Any]) -> int | None:
    kinds = config.get("layer_types")
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    return int(window) if kinds is None or kinds[index] == "sliding_attention" else None
