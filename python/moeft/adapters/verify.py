"""What an adapter is: its layout, what it changes, whose base it fits, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeft.adapters.base import Base
from moeft.adapters.convert import find_base
from moeft.adapters.detect import Detection, detect, num_experts
from moeft.adapters.folder import FINGERPRINT_KEY, AdapterFolder, Pair
from moeft.adapters.layout import Layout, split
from moeft.adapters.single_experts import structure_problems


@dataclass(frozen=True)
class Part:
    """What an adapter does to the weights of one name.

    Attributes:
        name: "q_proj", "experts.down_proj".
        weights: Matrices that have factors; of a stack each expert's.
        changed: Those whose delta is not zero; None where the layout, and so the expert, cannot be told.
        ranks: Every rank among them.
        scales: Every scale among them.
        trained: Whether any factor B is not zero.
    """

    name: str
    weights: int
    changed: int | None
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    trained: bool


@dataclass(frozen=True)
class Verification:
    """What was found. ``str()`` is a table.

    Attributes:
        path: The adapter folder.
        detection: Its layout and the evidence for it.
        parts: What it changes.
        base: Whether it bears the fingerprint of the base: "same", "other" or "unknown".
        problems: What is wrong, one sentence each.
    """

    path: str
    detection: Detection
    parts: tuple[Part, ...]
    base: str
    problems: tuple[str, ...]

    @property
    def layout(self) -> Layout | None:
        """The layout; None if it cannot be told."""
        return self.detection.layout

    def __str__(self) -> str:
        lines = [f"{'layout':<22}{self.layout or 'cannot be told'}"]
        lines += [f"  {evidence.source:<20}{evidence.says}" for evidence in self.detection.evidence]
        lines.append(f"{'base':<22}{self.base}")
        lines.append(f"{'part':<22}{'weights':>8}{'changed':>9}  {'rank':<10}{'scale':<10}")
        for part in self.parts:
            ranks, scales = (", ".join(f"{value:g}" for value in values) for values in (part.ranks, part.scales))
            changed = "?" if part.changed is None else part.changed
            lines.append(f"{part.name:<22}{part.weights:>8}{changed:>9}  {ranks:<10}{scales:<10}".rstrip())
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def verify(adapter: str | Path, base: str | Path | None = None) -> Verification:
    """Find out what an adapter is, from its data.

    Args:
        adapter: The adapter folder.
        base: 16-bit base checkpoint to compare it with; default the one that the adapter names, if it is there.

    Raises:
        AdapterError: If it is no LoRA adapter, is incomplete, or does not fit the base in any layout.
    """
    folder = AdapterFolder(adapter)
    known_base = find_base(folder, base)
    detection = detect(folder, known_base)
    by_part: dict[str, list[Pair]] = {}
    for pair in [*folder.others, *folder.stacks]:
        by_part.setdefault(_part(pair), []).append(pair)
    stacks = {pair.name for pair in folder.stacks}
    parts, problems = [], []
    for name, pairs in sorted(by_part.items()):
        part, broken = _measure(folder, name, pairs, stacks, known_base, detection.layout)
        parts.append(part)
        problems += broken
    if detection.layout is Layout.VLLM and known_base is not None:
        problems += structure_problems(folder, known_base)
    state = _compare(folder, known_base)
    if state == "other" and known_base is not None:
        problems.insert(0, f"it was trained on another base than {known_base.path}: the fingerprints differ")
    return Verification(str(folder.path), detection, tuple(parts), state, tuple(problems))


def _part(pair: Pair) -> str:
    module, _, last = pair.name.rpartition(".")
    return f"experts.{last}" if re.search(r"\.experts(\.\d+)?$", module) else last


def _measure(
    folder: AdapterFolder, name: str, pairs: Sequence[Pair], stacks: set[str], base: Base | None, layout: Layout | None
) -> tuple[Part, list[str]]:
    weights = changed = 0
    trained = False
    told = True
    problems = []
    for pair in pairs:
        a, b = folder.tensor(pair.a), folder.tensor(pair.b)
        for key, factor in ((pair.a, a), (pair.b, b)):
            if not bool(factor.isfinite().all()):
                problems.append(f"{key} holds values that are not finite")
        trained |= bool(b.any())
        experts = num_experts(folder, pair, base) if pair.name in stacks else 1
        weights += experts
        if pair.name not in stacks:
            changed += bool(a.any()) and bool(b.any())
        elif layout is None:
            told = False
        else:
            a_Eri, b_Eor = split(layout, a, b, experts)
            changed += int((a_Eri.flatten(1).any(dim=1) & b_Eor.flatten(1).any(dim=1)).sum())
    if not trained:
        problems.append(f"every factor B of {name} is zero: it was never trained, or saved before training")
    ranks = {folder.rank_of(pair.name) if pair.name in stacks else folder.shapes[pair.a][0] for pair in pairs}
    scales = {folder.scaling_of(pair.name) for pair in pairs}
    part = Part(name, weights, changed if told else None, tuple(sorted(ranks)), tuple(sorted(scales)), trained)
    return part, problems


def _compare(folder: AdapterFolder, base: Base | None) -> str:
    stamped = folder.metadata.get(FINGERPRINT_KEY)
    if stamped is None or base is None:
        return "unknown"
    return "same" if stamped == base.fingerprint() else "other"
