"""How many layers' experts stay on a card while the others are streamed, and what the transfers cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moeft.planning.sizes import format_bytes

if TYPE_CHECKING:
    from moeft.planning.report import Plan, PlanRow

SLOTS = 2  # of modules.streaming: one layer in use, the next on its way
PASSES = 2  # forward; and backward, in which a layer that runs again shares the transfer
ASSUMED_BUS = 24e9  # bytes per second of registered host memory over PCIe 4.0 x16
MOST_ROWS = 1 << 16
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
        compute_seconds: Shortest computation of a micro-batch, at the card's peak; None without a known card.
        rows_that_hide: Rows of a micro-batch from which on that is longer than the transfers; None if not known.
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
    rows_that_hide: int | None
    rows: int
    length: int

    @property
    def transfer_seconds(self) -> float:
        """Of a micro-batch, at the assumed speed."""
        return self.micro_batch_bytes / self.bus

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, derived figures included."""
        return {**vars(self), "transfer_seconds": self.transfer_seconds}

    def __str__(self) -> str:
        host = f"{format_bytes(self.host_bytes)} of host memory" if self.host_bytes else "read from the checkpoint"
        lines = [
            f"experts streamed: {self.resident} of {self.layers} layers resident, the others in "
            f"{format_bytes(self.slot_bytes)} of slots; {host}",
            f"  {format_bytes(self.micro_batch_bytes)} over the bus in a micro-batch: {self.transfer_seconds:.2f} s at "
            f"{self.bus / 1e9:.0f} GB/s, assumed",
        ]
        if self.compute_seconds is not None:
            hidden = self.compute_seconds >= self.transfer_seconds
            from_on = "" if self.rows_that_hide is None else f", from {self.rows_that_hide} x {self.length:,} tokens on"
            lines.append(
                f"  {'' if hidden else 'not '}hidden behind {self.compute_seconds:.2f} s of computation at the card's "
                f"peak{from_on}"
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
    """What a card holds less, if experts of all but the ``resident`` largest layers pass through slots."""
    largest_first = sorted(expert_bytes, reverse=True)
    streamed = len(expert_bytes) - resident
    return sum(largest_first[resident:]) - min(SLOTS, streamed) * largest_first[0]


def crossing_bytes(expert_bytes: Sequence[int], resident: int) -> int:
    """What crosses the bus in a micro-batch, if experts of all but ``resident`` layers are streamed."""
    streamed = len(expert_bytes) - resident
    return PASSES * (streamed - min(SLOTS, streamed)) * max(expert_bytes)


def stream(
    plan: Plan,
    expert_bytes: Sequence[int],
    resident: int,
    *,
    on_disk: bool,
    rows: int,
    length: int,
    bus: float | None,
    seconds_of: Callable[[int], float | None],
) -> Plan:
    """The same plan with all but ``resident`` layers' experts streamed.

    Args:
        plan: With all experts on the card.
        expert_bytes: Packed experts of each layer.
        resident: Layers whose experts stay.
        on_disk: Whether the others stay in the files of the checkpoint.
        rows: Rows of a micro-batch.
        length: Tokens of a row.
        bus: Bytes per second from host memory; None assumes them.
        seconds_of: Shortest computation of a micro-batch of so many rows; None without a known card.
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
        micro_batch_bytes=crossing_bytes(expert_bytes, resident),
        bus=bus or ASSUMED_BUS,
        compute_seconds=seconds_of(rows),
        rows_that_hide=None,
        rows=rows,
        length=length,
    )
    found = replace(found, rows_that_hide=_fewest_rows(found.transfer_seconds, seconds_of))
    changed: list[PlanRow] = []
    for row in plan.rows:
        if row.component != "experts" or not row.dtype.startswith("nf4"):  # biases stay
            changed.append(row)
            continue
        source = f"{resident} of {count} layers resident, the others streamed"
        changed.append(replace(row, bytes=row.bytes - waiting, source=source))
        slot = replace(row, component=EXPERT_SLOTS, bytes=found.slot_bytes, parameters=0)
        changed.append(replace(slot, source=f"{slots} layers at a time"))
    return replace(plan, rows=tuple(changed), streaming=found)


def _fewest_rows(seconds: float, seconds_of: Callable[[int], float | None]) -> int | None:
    """Fewest rows whose computation takes so long; None if not known, or if it takes absurdly many."""
    low, high = 0, 1
    while (least := seconds_of(high)) is None or least < seconds:
        if least is None or high >= MOST_ROWS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if (seconds_of(middle) or 0) >= seconds else (middle, high)
    return high
