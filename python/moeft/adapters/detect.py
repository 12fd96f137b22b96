"""Which layout an adapter is in, from what lies in it.

Each piece of evidence says which layouts remain possible. What remains after all of them is the answer; two or more
mean that nobody can tell, none that the evidence contradicts itself. Marks that a writer set and the data itself decide
alone; the release of PEFT and the writer, which a later tool may have left as they were, count only for what is still
open after those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeft.adapters.base import Base
from moeft.adapters.folder import AdapterFolder, Pair
from moeft.adapters.layout import HEADER_KEY, STACKED, Layout, from_header, split
from moeft.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "lora_B_layout"
"""Key of adapter_config.json in which unsloth records the order of B's columns, since 2026-09."""

_MARKED = {"rank_major": False, "grouped_by_expert": True}


@dataclass(frozen=True)
class Evidence:
    """One observation."""

    source: str  # "names", "header", "config", "shapes", "zeros", "peft", "writer"
    says: str
    possible: frozenset[Layout]


@dataclass(frozen=True)
class Detection:
    """What an adapter's layout can be.

    Attributes:
        possible: Layouts that no evidence excludes.
        evidence: Every observation that counted.
    """

    possible: frozenset[Layout]
    evidence: tuple[Evidence, ...]

    @property
    def layout(self) -> Layout | None:
        """The layout, if there is only one; without expert stacks all are the same, and it is PEFT."""
        return next(iter(self.possible)) if len(self.possible) == 1 else None

    @property
    def reason(self) -> str:
        """Why the layout cannot be told."""
        seen = "; ".join(f"{evidence.source}: {evidence.says}" for evidence in self.evidence)
        if not self.possible:
            return f"the evidence contradicts itself ({seen}); it was changed by a tool that left its marks in place"
        return (
            f"it may be {' or '.join(sorted(self.possible))} ({seen}); give the base, or say with --from who wrote it"
        )


def detect(adapter: AdapterFolder, base: Base | None = None) -> Detection:
    """Collect the evidence.

    Raises:
        AdapterError: If the factors fit the base in no layout.
    """
    per_expert = [key for key in adapter.shapes if re.search(r"\.experts\.\d+\.", key)]
    stacks = adapter.stacks
    if not stacks:
        layout = Layout.VLLM if per_expert else Layout.PEFT
        says = f"{len(per_expert)} factors of single experts" if per_expert else "no factors of experts"
        return Detection(frozenset([layout]), (Evidence("names", says, frozenset([layout])),))
    possible: frozenset[Layout] = frozenset() if per_expert else frozenset(STACKED)
    evidence = [Evidence("names", f"{len(stacks)} stacks of experts", possible)]
    evidence += [found for found in (_header(adapter), _marker(adapter), _shapes(adapter, stacks, base)) if found]
    possible = _narrow(possible, evidence)
    if len({layout.grouped for layout in possible}) > 1 and (found := _zeros(adapter, stacks, base, possible)):
        evidence.append(found)
        possible = _narrow(possible, evidence)
    for found in (_release(adapter), _writer(adapter)):
        if found and len(possible) > 1 and possible & found.possible:
            evidence.append(found)
            possible &= found.possible
    return Detection(possible, tuple(evidence))


def num_experts(adapter: AdapterFolder, pair: Pair, base: Base | None) -> int:
    """Experts of a stack: those of the base, or what the rank leaves.

    Raises:
        AdapterError: If the rows of A are no multiple of the rank, or the base has another number of experts.
    """
    rows, rank = adapter.shapes[pair.a][0], adapter.rank_of(pair.name)
    if rows % rank or adapter.shapes[pair.b][1] != rows or (base is not None and rows != rank * base.num_experts):
        wanted = f"rank {rank} times {base.num_experts} experts" if base else f"a multiple of the rank {rank}"
        raise AdapterError(
            f"{adapter.path}: {pair.name} has {rows} rows in A and {adapter.shapes[pair.b][1]} columns in B, expected "
            f"{wanted}; is this the right base model?"
        )
    return rows // rank


def _narrow(possible: frozenset[Layout], evidence: list[Evidence]) -> frozenset[Layout]:
    for found in evidence:
        possible &= found.possible
    return possible


def _header(adapter: AdapterFolder) -> Evidence | None:
    text = adapter.metadata.get(HEADER_KEY)
    layout = None if text is None else from_header(text)
    return None if layout is None else Evidence("header", f"{HEADER_KEY} is {text}", frozenset([layout]))


def _marker(adapter: AdapterFolder) -> Evidence | None:
    value: Any = adapter.config.get(MARKER)
    if value not in _MARKED:
        return None
    fits = frozenset(layout for layout in STACKED if layout.grouped == _MARKED[value])
    return Evidence("config", f"{MARKER} is {value}", fits)


def _shapes(adapter: AdapterFolder, stacks: list[Pair], base: Base | None) -> Evidence | None:
    """Whether inputs and outputs are swapped, from the sizes of the base or from both stacks of a layer together."""
    fits = {False, True}
    if base is not None:
        for pair in stacks:
            num_experts(adapter, pair, base)
            outputs, inputs = base.sizes[pair.name.rpartition(".")[2]]
            sizes = (adapter.shapes[pair.b][0], adapter.shapes[pair.a][1])
            fits &= {swapped for swapped in fits if sizes == ((inputs, outputs) if swapped else (outputs, inputs))}
            if not fits:
                raise AdapterError(
                    f"{adapter.path}: {pair.name} maps {sizes[1]} to {sizes[0]}, but the base's maps {inputs} to "
                    f"{outputs}; is this the right base model?"
                )
    else:
        by_module: dict[str, dict[str, tuple[int, int]]] = {}
        for pair in stacks:
            module, _, stack = pair.name.rpartition(".")
            by_module.setdefault(module, {})[stack] = (adapter.shapes[pair.b][0], adapter.shapes[pair.a][1])
        for sizes_of in by_module.values():
            if len(sizes_of) == 2:
                fits &= {swapped for swapped in fits if _consistent(sizes_of, swapped)}
    if len(fits) == 2:
        return None
    possible = frozenset(layout for layout in STACKED if layout.swapped in fits)
    where = "those of the base" if base is not None else "each other"
    if not fits:
        return Evidence("shapes", f"the sizes of both stacks do not fit {where}", possible)
    way = "swapped" if True in fits else "not swapped"
    return Evidence("shapes", f"inputs and outputs, beside {where}, are {way}", possible)


def _consistent(sizes: dict[str, tuple[int, int]], swapped: bool) -> bool:
    """Whether gate_up ``[2I, H]`` and down ``[H, I]`` go together."""
    (up_out, up_in), (down_out, down_in) = (
        sizes[stack][::-1] if swapped else sizes[stack] for stack in ("gate_up_proj", "down_proj")
    )
    return up_in == down_out and up_out == 2 * down_in


def _zeros(
    adapter: AdapterFolder, stacks: list[Pair], base: Base | None, possible: frozenset[Layout]
) -> Evidence | None:
    """The order of B's columns, from experts that no token reached: all their columns are zero, as B started."""
    fits = {False, True}
    told = 0
    for pair in stacks:
        zero = ~adapter.tensor(pair.b).any(dim=0)
        if bool(zero.all()) or not bool(zero.any()):
            continue
        whole = {grouped for grouped in (False, True) if _by_expert(zero, num_experts(adapter, pair, base), grouped)}
        if len(whole) == 1:
            fits &= whole
            told += 1
    if not told:
        return None
    order = "contradict each other" if not fits else "together" if True in fits else "interleaved"
    says = f"the zero columns of untouched experts, in {told} stacks, lie {order}"
    return Evidence("zeros", says, frozenset(layout for layout in possible if layout.grouped in fits))


def _by_expert(zero: Tensor, num_experts: int, grouped: bool) -> bool:
    """Whether every expert's columns are all zero or all not."""
    layout = Layout.UNSLOTH if grouped else Layout.PEFT
    _, columns_E1r = split(layout, zero.new_zeros(num_experts, 1), zero[None], num_experts)
    return bool((columns_E1r.all(dim=2) | ~columns_E1r.any(dim=2)).all())


def is_swapped_release(version: Any) -> bool | None:
    """Whether a release of PEFT took outputs of stacks for inputs; None if it does not tell (a development version)."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", str(version or ""))
    if match is None:
        return None
    numbers = tuple(map(int, match.groups()[:3]))
    # The swap went with 0.19.1, so development versions of 0.19 do not tell.
    return None if numbers[:2] == (0, 19) and match[4] else numbers < (0, 19, 1)


def _release(adapter: AdapterFolder) -> Evidence | None:
    version = adapter.config.get("peft_version")
    swapped = is_swapped_release(version)
    if swapped is None:
        return None
    fits = frozenset(layout for layout in STACKED if layout.swapped == swapped)
    return Evidence("peft", f"peft_version is {version}", fits)


def _writer(adapter: AdapterFolder) -> Evidence | None:
    named = str(adapter.config.get("base_model_name_or_path") or "")
    if (adapter.config.get("auto_mapping") or {}).get("unsloth_fixed") or named.startswith("unsloth/"):
        return Evidence("writer", f"unsloth's, without {MARKER}: either order", frozenset(STACKED))
    fits = frozenset(layout for layout in STACKED if not layout.grouped)
    return Evidence("writer", "no mark of unsloth; PEFT interleaves", fits)
