"""Graphics cards by their data sheets: memory, dense bf16 products with float32 sums, memory bandwidth."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """One card.

    Attributes:
        name: As its vendor writes it.
        memory_bytes: Memory.
        flops: Peak of dense bf16 matrix products, per second.
        bandwidth: Bytes per second to and from its memory.
        bus: Bytes per second from registered host memory, assumed: three quarters of its PCIe link.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    bus: float = 24e9


DEVICES = {
    device.name: device
    for device in (
        Device("RTX 3060", 12 * GIB, 25.5e12, 360e9),
        Device("RTX 3090", 24 * GIB, 71e12, 936e9),
        Device("RTX 4060 Ti 16GB", 16 * GIB, 44e12, 288e9, 12e9),
        Device("RTX 4090", 24 * GIB, 165e12, 1008e9),
        Device("RTX 5090", 32 * GIB, 209.5e12, 1792e9, 48e9),
        Device("L4", 24 * GIB, 121e12, 300e9),
        Device("L40S", 48 * GIB, 362e12, 864e9),
        Device("A100 80GB", 80 * GIB, 312e12, 2039e9),
        Device("H100 SXM", 80 * GIB, 989e12, 3350e9, 48e9),
        Device("H200", 141 * GIB, 989e12, 4800e9, 48e9),
    )
}


def find_device(name: str) -> Device | None:
    """The card of that name, whatever its case and spaces; None if it is not in the table."""
    plain = {_plain(known): device for known, device in DEVICES.items()}
    wanted = _plain(name)
    return plain.get(wanted) or next((device for key, device in plain.items() if wanted and wanted in key), None)


def nearest_names(name: str) -> list[str]:
    """Names in the table that resemble another."""
    return difflib.get_close_matches(name, DEVICES, n=3, cutoff=0.3) or list(DEVICES)


def _plain(name: str) -> str:
    return name.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "").replace("-", "")
