"""One pair of factors per expert and projection, as vLLM loads them, to and from pairs per stack.

The gate and up of a stack share A: their rows of B are apart, so A is written twice. Back, a gate and an up with one A
become one pair again; with different ones they become a pair of twice the rank, ``A = [A_gate; A_up]`` and ``B`` the
block diagonal of both, which computes the same. The header records that, so that it can be undone.

Shapes: E experts, r rank, I expert hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from moeft.adapters.base import Base, expert_names
from moeft.adapters.folder import PREFIX, AdapterFolder, Pair
from moeft.adapters.layout import Layout, split
from moeft.adapters.writer import Output
from moeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS_KEY = "moeft.gate_up_blocks"
"""Metadata key of a stacked adapter whose gate and up have an A each, in a pair of twice the rank."""

PROJECTIONS = ("gate", "up", "down")
_OTHER_MODULES = {"gemma4": "moe.experts"}
"""Families whose experts vLLM keeps under another module than the checkpoint (vllm/model_executor/models/gemma4.py)."""


def names(base: Base) -> dict[str, str]:
    """Projection -> vLLM's name of it below a decoder layer, ``{e}`` the expert."""
    family = base.family
    if on_disk := expert_names(family):
        return dict(zip(PROJECTIONS, (name.removesuffix(".weight") for name in on_disk), strict=True))
    module = _OTHER_MODULES.get(family.name, family.experts)
    return {projection: f"{module}.{{e}}.{projection}_proj" for projection in PROJECTIONS}


def unstack(adapter: AdapterFolder, layout: Layout, base: Base) -> Iterator[Output]:
    """The tensors of every expert of an adapter whose pairs are per stack."""
    by_projection = names(base)
    blocks = adapter.metadata.get(BLOCKS_KEY) == "1"

    @lru_cache(maxsize=1)  # The experts of a stack come one after the other.
    def read(pair: Pair) -> tuple[Tensor, Tensor]:
        return split(layout, adapter.tensor(pair.a), adapter.tensor(pair.b), base.num_experts)

    for pair in adapter.stacks:
        module, _, stack = pair.name.rpartition(".")
        layer = module.removesuffix(f".{base.family.experts}")
        rank = adapter.rank_of(pair.name)
        outputs, inputs = base.sizes[stack]
        parts = {"down": (slice(0, rank), slice(0, outputs))}
        if stack == "gate_up_proj":
            gate, up = (slice(0, rank), slice(0, rank))
            if blocks:
                gate, up = slice(0, rank // 2), slice(rank // 2, rank)
            parts = {"gate": (gate, slice(0, outputs // 2)), "up": (up, slice(outputs // 2, outputs))}
        for expert in range(base.num_experts):
            for projection, (ranks, rows) in parts.items():
                name = f"{PREFIX}{layer}.{by_projection[projection].format(e=expert)}"
                rank = ranks.stop - ranks.start
                for factor, key, shape in (
                    ("A", pair.a, (rank, inputs)),
                    ("B", pair.b, (rows.stop - rows.start, rank)),
                ):
                    part = partial(_part, read, pair, factor, expert, ranks, rows)
                    yield Output(f"{name}.lora_{factor}.weight", adapter.dtypes[key], shape, part)


def _part(
    read: Callable[[Pair], tuple[Tensor, Tensor]], pair: Pair, factor: str, expert: int, ranks: slice, rows: slice
) -> Tensor:
    a_Eri, b_Eor = read(pair)
    return a_Eri[expert, ranks] if factor == "A" else b_Eor[expert, rows, ranks]


@dataclass(frozen=True)
class Stack:
    """One stack put together from the factors of its experts."""

    name: str  # in memory: "model.layers.0.mlp.experts.down_proj"
    rank: int
    dtype: str
    sizes: tuple[int, int]  # outputs, inputs
    read: Callable[[], tuple[Tensor, Tensor]]  # [E, r, in] and [E, out, r]


def restack(adapter: AdapterFolder, base: Base) -> tuple[list[Stack], set[str], bool]:
    """Put the experts of a per-expert adapter together.

    Returns:
        The stacks, the keys that they consume, and whether gate and up are blocks.

    Raises:
        AdapterError: If an expert does not exist in the base or a factor lacks its partner.
    """
    by_projection = names(base)
    layers: dict[str, dict[str, dict[int, str]]] = {}  # layer -> projection -> expert -> key without the factor
    used: set[str] = set()
    for projection, name in by_projection.items():
        pattern = re.compile(rf"(.+)\.{re.escape(name).replace(re.escape('{e}'), '([0-9]+)')}\.lora_([AB])\.weight")
        for key in adapter.shapes:
            if match := pattern.fullmatch(key):
                layer, expert = match[1], int(match[2])
                if expert >= base.num_experts:
                    raise AdapterError(f"{key} is of expert {expert}, but {base.path} has {base.num_experts} per layer")
                layers.setdefault(layer, {}).setdefault(projection, {})[expert] = key[: -len("A.weight")]
                used.add(key)
    partners = {key + factor for of_layer in layers.values() for keys in of_layer.values() for key in keys.values()
                for factor in ("A.weight", "B.weight")}  # fmt: skip
    if lone := sorted(partners - used):
        raise AdapterError(f"{adapter.path} lacks {lone[0]}, the partner of a factor that it has; is it complete?")
    blocks = any(_gate_and_up_differ(adapter, of_layer) for of_layer in layers.values())
    stacks = []
    for layer, of_layer in sorted(layers.items()):
        module = f"{layer.removeprefix(PREFIX)}.{base.family.experts}"
        for stack, projections in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            present = {projection: of_layer[projection] for projection in projections if projection in of_layer}
            if present:
                stacks.append(_stack(adapter, base, f"{module}.{stack}", projections, present, blocks))
    return stacks, used, blocks


def _gate_and_up_differ(adapter: AdapterFolder, of_layer: dict[str, dict[int, str]]) -> bool:
    gate, up = of_layer.get("gate", {}), of_layer.get("up", {})
    for expert in gate.keys() & up.keys():
        a, b = (adapter.tensor(keys[expert] + "A.weight") for keys in (gate, up))
        if a.shape != b.shape or not bool((a == b).all()):
            return True
    return False


def _stack(
    adapter: AdapterFolder,
    base: Base,
    name: str,
    projections: tuple[str, ...],
    present: dict[str, dict[int, str]],
    blocks: bool,
) -> Stack:
    outputs, inputs = base.sizes[name.rpartition(".")[2]]
    all_keys = [key for keys in present.values() for key in keys.values()]
    for key in all_keys:
        a, b = adapter.shapes[key + "A.weight"], adapter.shapes[key + "B.weight"]
        if (b[0], a[1], b[1]) != (outputs // len(projections), inputs, a[0]):
            raise AdapterError(
                f"{adapter.path}: {key}A is {list(a)} and B {list(b)}, expected [r, {inputs}] and "
                f"[{outputs // len(projections)}, r]; is this the right base model?"
            )
    rank = max(adapter.shapes[key + "A.weight"][0] for key in all_keys)
    blocks = blocks and len(projections) == 2
    dtype = adapter.dtypes[all_keys[0] + "A.weight"]

    def read() -> tuple[Tensor, Tensor]:
        import torch

        like = adapter.tensor(all_keys[0] + "A.weight")
        total = 2 * rank if blocks else rank
        a_Eri = torch.zeros(base.num_experts, total, inputs, dtype=like.dtype)
        b_Eor = torch.zeros(base.num_experts, outputs, total, dtype=like.dtype)
        height = outputs // len(projections)
        for place, projection in enumerate(projections):
            first = place * rank if blocks else 0
            for expert, key in present.get(projection, {}).items():
                a, b = adapter.tensor(key + "A.weight"), adapter.tensor(key + "B.weight")
                a_Eri[expert, first : first + a.shape[0]] = a
                b_Eor[expert, place * height : (place + 1) * height, first : first + a.shape[0]] = b
        return a_Eri, b_Eor

    return Stack(name, 2 * rank if blocks else rank, dtype, (outputs, inputs), read)
