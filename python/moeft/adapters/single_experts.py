"""Whether an adapter of single experts is whole: what vLLM's loader of experts takes, held against the base."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moeft.adapters.base import Base
from moeft.adapters.folder import AdapterFolder
from moeft.adapters.per_expert import names

_LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


def structure_problems(adapter: AdapterFolder, base: Base) -> Iterator[str]:
    """What is missing or has another shape, for an adapter in the layout ``vllm``.

    Every layer that has an expert needs all experts of it, and for each the same projections; A is ``[r, in]`` and B
    ``[out, r]`` with one rank throughout.

    Args:
        adapter: The adapter.
        base: The checkpoint that it was trained on.
    """
    shapes = {key: tuple(shape) for key, shape in adapter.shapes.items()}
    layers = sorted({found[1] for key in shapes if ".experts." in key and (found := _LAYER.match(key))})
    by_projection = {name: template for name, template in names(base).items() if _occurs(template, shapes)}
    ranks = {shape[0] for key, shape in shapes.items() if ".experts." in key and key.endswith(".lora_A.weight")}
    if len(ranks) > 1:
        yield f"its experts have ranks {', '.join(map(str, sorted(ranks)))}, but vLLM reads one rank for all"
    for layer in layers:
        for projection, template in by_projection.items():
            outputs, inputs = base.sizes["down_proj" if projection == "down" else "gate_up_proj"]
            outputs //= 1 if projection == "down" else 2
            for expert in range(base.num_experts):
                name = f"{layer}.{template.format(e=expert)}"
                a, b = (shapes.get(f"{name}.lora_{factor}.weight") for factor in "AB")
                if a is None or b is None:
                    yield f"{name} is missing, expected all {base.num_experts} experts of the layer"
                elif (b[0], a[1], b[1]) != (outputs, inputs, a[0]):
                    expected = f"[r, {inputs}] and [{outputs}, r]"
                    yield f"{name} has A {list(a)} and B {list(b)}, expected {expected}; is this the right base?"


def _occurs(template: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    pattern = re.compile(rf"\.{re.escape(template).replace(re.escape('{e}'), '[0-9]+')}\.lora_[AB]\.weight$")
    return any(pattern.search(key) for key in shapes)
