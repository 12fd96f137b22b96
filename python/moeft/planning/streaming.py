"""How many layers' experts stay on a card while the others are streamed, and what the transfers cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moeft.planning.sizes import format_bytes

if TYPE_CHECKING:
    from moeft.planning.devices import Device
    from moeft.planning.report import Plan, PlanRow
    from moeft.planning.speed import Speed

SLOTS = 2  # of modules.streaming: one layer in use, the next on its way
PASSES = 2  # forward; and backward, in which a layer that runs again shares the transfer
ASSUMED_BUS = 24e9  # bytes per second of registered host memory over PCIe 4.0 x16
EXPERT_SLOTS = "expert slots"


@dataclass(frozen=True)
class Streaming:
    """Experts that wait off the card. ``str()`` is a few lines.

    Attributes:
        layers: Layers with experts.
        resident: Those whose experts stay on the card.
        layer_bytes: Packed experts of the largest layer.
        slot_bytes: All slots on the card.
        host_bytes: Host memory that streamed experts take; 0 where they stay in files.
        micro_batch_bytes: What crosses the bus in a micro-batch.
        bus: Assumed bytes per second.
        compute_seconds: Predicted computation of a micro-batch; None without a known card.
        rows: Rows of a micro-batch.
        length: Tokens of a row.
    """

    layers: int
    resident: int
    layer_bytes: int
    slot_bytes: int
    host_bytes: int
    micro_batch_bytes: int
    bus: float
    compute_seconds: float | None
    rows: int
    length: int

    @property
    def transfer_seconds(self) -> float:
        """Of a micro-batch, at the assumed speed."""
        return self.micro_batch_bytes / self.bus

    @property
    def rows_that_hide(self) -> int | None:
        """Rows of a micro-batch from which on its computation takes longer than the transfers; None if not known."""
        if self.compute_seconds is None:
            return None
        return max(1, math.ceil(self.rows * self.transfer_seconds / self.compute_seconds))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, derived figures included."""
        return {**vars(self), "transfer_seconds": self.transfer_seconds, "rows_that_hide": self.rows_that_hide}

    def __str__(self) -> str:
        host = f"{format_bytes(self.host_bytes)} of host memory" if self.host_bytes else "read from the checkpoint"
        lines = [
            f"experts streamed: {self.resident} of {self.layers} layers resident, the others in "
            f"{format_bytes(self.slot_bytes)} of slots; {host}",
            f"  {format_bytes(self.micro_batch_bytes)} over the bus in a micro-batch: {self.transfer_seconds:.2f} s at "
            f"{self.bus / 1e9:.0f} GB/s, assumed",
        ]
        rows = self.rows_that_hide
        if rows is not None and self.compute_seconds is not None:
            verdict = "hidden behind" if rows <= self.rows else "not hidden behind"
            lines.append(
                f"  {verdict} {self.compute_seconds:.2f} s of computation, predicted; hidden from {rows} x "
                f"{self.length:,} tokens in a micro-batch on"
            )
        return "\n".join(lines)


def solve(expert_bytes: Sequence[int], device_bytes: int, vram_bytes: int | None) -> int | None:
    """The largest number of layers, below all, whose experts can stay resident.

    Args:
        expert_bytes: Packed experts of each layer.
        device_bytes: What the card holds with all of them.
        vram_bytes: Its memory; None for no layer at all.

    Returns:
        None if it is too small even for none.
    """
    if vram_bytes is None:
        return 0
    for resident in reversed(range(len(expert_bytes))):
        if device_bytes - saved_bytes(expert_bytes, resident) <= vram_bytes:
            return resident
    return None


def saved_bytes(expert_bytes: Sequence[int], resident: int) -> int:
    """What a card holds less, if the experts of all but ``resident`` layers are streamed through slots."""
    largest_first = sorted(expert_bytes, reverse=True)
    streamed = len(expert_bytes) - resident
    return sum(largest_first[resident:]) - min(SLOTS, streamed) * largest_first[0]


def stream(
    plan: Plan,
    expert_bytes: Sequence[int],
    resident: int,
    *,
    on_disk: bool,
    rows: int,
    length: int,
    card: Device | None,
    speed: Speed | None,
) -> Plan:
    """The same plan with all but ``resident`` layers' experts streamed.

    Args:
        plan: With all experts on the card.
        expert_bytes: Packed experts of each layer.
        resident: Layers whose experts stay.
        on_disk: Whether the others stay in the files of the checkpoint.
        rows: Rows of a micro-batch.
        length: Tokens of a row.
        card: For the speed of its bus; None assumes one.
        speed: Predicted speed of computation.
    """
    layer_bytes, count = max(expert_bytes), len(expert_bytes)
    streamed = count - resident
    slots = min(SLOTS, streamed)
    waiting = sum(sorted(expert_bytes, reverse=True)[resident:])
    found = Streaming(
        layers=count,
        resident=resident,
        layer_bytes=layer_bytes,
        slot_bytes=slots * layer_bytes,
        host_bytes=0 if on_disk else waiting,
        micro_batch_bytes=PASSES * (streamed - slots) * layer_bytes,
        bus=ASSUMED_BUS if card is None else card.bus,
        compute_seconds=None if speed is None else rows * length / speed.tokens_per_second,
        rows=rows,
        length=length,
    )
    changed: list[PlanRow] = []
    for row in plan.rows:
        if row.component != "experts":
            changed.append(row)
            continue
        source = f"{resident} of {count} layers resident, the others streamed"
        changed.append(replace(row, bytes=row.bytes - waiting, source=source))
        slot = replace(row, component=EXPERT_SLOTS, bytes=found.slot_bytes, parameters=0)
        changed.append(replace(slot, source=f"{slots} layers at a time"))
    return replace(plan, rows=tuple(changed), streaming=found)
