"""Packed experts that wait in host memory or in a file, and take turns in a few slots of a device.

A :class:`Ring` owns the slots and decides what is where; a copier (:mod:`copier`, :mod:`cuda`) moves bytes; an
:class:`Image` says how the tensors of one layer lie in a slot. Nothing here knows models.
"""

from moeft.modules.streaming.host_memory import HostMemory
from moeft.modules.streaming.image import Image
from moeft.modules.streaming.lender import RingLender
from moeft.modules.streaming.ring import Ring, Source

__all__ = ["HostMemory", "Image", "Ring", "RingLender", "Source"]
