"""The result of planning: every byte with where its number comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moeft.planning.advice import Knob
from moeft.planning.host import HostForecast
from moeft.planning.sizes import format_bytes
from moeft.planning.speed import Speed
from moeft.planning.streaming import Streaming

ALWAYS = "always"
LOSS_HEAD = "loss head"
LAYER_BACKWARD = "layer backward"
FORWARD_PASS = "pass without gradients"
PHASES = (LOSS_HEAD, LAYER_BACKWARD, FORWARD_PASS)
WEIGHTS = ("experts", "attention", "mlp", "router", "embeddings", "norms", "other", "towers")


@dataclass(frozen=True)
class PlanRow:
    """One component.

    Attributes:
        component: What it is.
        dtype: How it is held.
        bytes: Its size.
        source: Where the number comes from.
        phase: "always", or when it exists: "loss head" or "layer backward" of a step, or "pass without gradients".
        parameters: Elements, of weights and adapters.
        exact: Whether the number is arithmetic on shapes; estimates follow the order of operations in the code.
    """

    component: str
    dtype: str
    bytes: int
    source: str
    phase: str = ALWAYS
    parameters: int = 0
    exact: bool = True


@dataclass(frozen=True)
class Plan:
    """Forecast of training a model. ``str()`` is a table.

    Attributes:
        model: Name of the model.
        rows: All components.
        fragmentation_bytes: What the caching allocator is assumed to hold beyond what is in use.
        context_bytes: What CUDA is assumed to take for itself.
        vram_bytes: Memory of the card; None if it was not said.
        advice: What would make it smaller, largest saving first.
        speed: Predicted speed; None without a device.
        host: Training on the CPU instead; None for a model whose layers are not understood.
        streaming: What experts off the card cost; None if all are on it.
        spread: What each of several GPUs holds and receives; None for one.
        notes: Assumptions, and what is left out.
    """

    model: str
    rows: tuple[PlanRow, ...]
    fragmentation_bytes: int
    context_bytes: int
    vram_bytes: int | None = None
    advice: tuple[Knob, ...] = ()
    speed: Speed | None = None
    host: HostForecast | None = None
    streaming: Streaming | None = None
    spread: Any = None
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        """Parameters of the model as it is loaded, without the adapter."""
        return sum(row.parameters for row in self.rows if row.component in WEIGHTS)

    @property
    def peak_phase(self) -> str:
        """The part of a step in which most memory is in use."""
        return max(PHASES, key=self._phase_bytes)

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes in use at once: what ``torch.cuda.max_memory_allocated`` reports."""
        return self._phase_bytes(ALWAYS) + self._phase_bytes(self.peak_phase)

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes that the caching allocator holds: what ``torch.cuda.max_memory_reserved`` reports."""
        return self.peak_allocated_bytes + self.fragmentation_bytes

    @property
    def device_bytes(self) -> int:
        """All that the process takes from the card."""
        return self.peak_reserved_bytes + self.context_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it fits the card; None if no size was given."""
        return None if self.vram_bytes is None else self.device_bytes <= self.vram_bytes

    def bytes_of(self, component: str) -> int:
        """Bytes of a component; 0 if it has none."""
        return sum(row.bytes for row in self.rows if row.component == component)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, derived figures included."""
        derived = ("parameters", "peak_phase", "peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "fits")
        result = {**asdict(self), **{name: getattr(self, name) for name in derived}}
        result["spread"] = None if self.spread is None else self.spread.to_json()
        result["streaming"] = None if self.streaming is None else self.streaming.to_json()
        if self.host is not None:
            result["host"]["peak_bytes"] = self.host.peak_bytes
        return result

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.parameters:,} parameters", ""]
        lines.append(f"{'component':<28}{'dtype':<18}{'bytes':>16}{'':>12}  source")
        for phase in (ALWAYS, *PHASES):
            found = [_line(row) for row in self.rows if row.phase == phase]
            if phase != ALWAYS and found:
                lines.append(f"during {phase}:")
            lines += found
        lines += ["", self._total("peak allocated", self.peak_allocated_bytes, f"at its {self.peak_phase}")]
        lines.append(self._total("peak reserved", self.peak_reserved_bytes, "with fragmentation, assumed"))
        lines.append(self._total("on the card", self.device_bytes, "with the CUDA context, assumed"))
        if self.vram_bytes is not None:
            verdict = "fits" if self.fits else f"does not fit, {format_bytes(self.device_bytes - self.vram_bytes)} over"
            lines.append(self._total("card", self.vram_bytes, verdict))
        if self.streaming is not None:
            lines += ["", str(self.streaming)]
        if self.speed is not None:
            lines += ["", str(self.speed)]
        if self.host is not None:
            lines += ["", str(self.host)]
        if self.spread is not None:
            lines += ["", str(self.spread)]
        if self.advice:
            lines += ["", "what would change it, one at a time:", *(f"  {knob}" for knob in self.advice)]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def _phase_bytes(self, phase: str) -> int:
        return sum(row.bytes for row in self.rows if row.phase == phase)

    def _total(self, name: str, size: int, remark: str) -> str:
        return f"{name:<46}{size:>16,}{format_bytes(size):>12}  {remark}"


def _line(row: PlanRow) -> str:
    about = "" if row.exact else "about "
    return f"{row.component:<28}{row.dtype:<18}{row.bytes:>16,}{format_bytes(row.bytes):>12}  {about}{row.source}"
