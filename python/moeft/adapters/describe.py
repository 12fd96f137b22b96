"""What adapter_config.json has to say of factors in another layout."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from moeft.adapters.base import Base
from moeft.adapters.detect import MARKER, is_swapped_release
from moeft.adapters.folder import AdapterFolder
from moeft.adapters.layout import Layout
from moeft.adapters.per_expert import BLOCKS_KEY, Stack, names
from moeft.errors import AdapterError


def mark(config: dict[str, Any], to: Layout) -> None:
    """Record a release of PEFT that reads the layout, and unsloth's order of columns."""
    config.pop(MARKER, None)
    if to.grouped:
        config[MARKER] = "grouped_by_expert"
    if is_swapped_release(config.get("peft_version")) is not to.swapped:
        config["peft_version"] = "0.18.1" if to.swapped else "0.19.1"


def describe_experts(adapter: AdapterFolder, base: Base, config: dict[str, Any]) -> None:
    """Make ``config`` say of single experts what it says of stacks.

    Raises:
        AdapterError: If the adapter has several scales: vLLM applies one, ``lora_alpha / r``, to all of it.
    """
    pairs = [*adapter.stacks, *adapter.others]
    scales = {pair.name: adapter.scaling_of(pair.name) for pair in pairs}
    first, scale = next(iter(scales.items()))
    for name, other in scales.items():
        if _f32(other) != _f32(scale):
            raise AdapterError(
                f"{adapter.path} scales {first} by {scale:g} and {name} by {other:g}, but vLLM has one scale; "
                "merge it instead, or train it with equal scales (moeft does, unless `alphas` is set)"
            )
    blocks = adapter.metadata.get(BLOCKS_KEY) == "1"
    halved = {pair.name for pair in adapter.stacks if blocks and pair.name.endswith("gate_up_proj")}
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        rank = max(adapter.rank_of(pair.name) // (2 if pair.name in halved else 1) for pair in pairs)
        config |= {"r": rank, "lora_alpha": _plain(scale * rank), "use_rslora": False}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
    linears = {pair.name.rpartition(".")[2] for pair in adapter.others}
    config["target_modules"] = sorted(linears | {name.rpartition(".")[2] for name in names(base).values()})
    config["target_parameters"] = None


def describe_stacks(adapter: AdapterFolder, stacks: Sequence[Stack], used: set[str], config: dict[str, Any]) -> None:
    """Make ``config`` say of stacks what it says of single experts, each with the rank that it has.

    Raises:
        AdapterError: If the config has patterns, which per-expert adapters do not.
    """
    for pattern in ("rank_pattern", "alpha_pattern"):
        if config.get(pattern):
            raise AdapterError(
                f"{adapter.path}: {pattern} is {config[pattern]}, but vLLM reads one rank and scale for all; "
                f"remove {pattern} if that is how it was trained"
            )
    linears = [pair for pair in adapter.others if pair.a not in used]
    ranks = {stack.name: stack.rank for stack in stacks}
    ranks |= {pair.name: adapter.shapes[pair.a][0] for pair in linears}
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != adapter.rank}
    power = 0.5 if adapter.config.get("use_rslora") else 1.0
    config["rank_pattern"] = other
    config["alpha_pattern"] = {
        name: _plain(adapter.alpha * math.pow(rank / adapter.rank, power)) for name, rank in other.items()
    }
    config["target_modules"] = sorted(pair.name for pair in linears)
    config["target_parameters"] = sorted(stack.name for stack in stacks)


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _f32(value: float) -> bytes:
    """The scale as PEFT and vLLM multiply with it."""
    return struct.pack("f", value)
