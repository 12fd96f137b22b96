"""The stacks of one layer, borrowed from a ring when the expert block computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moeft.kernels.nf4 import NF4Weight
from moeft.modules.streaming.image import Image
from moeft.modules.streaming.ring import Ring


class RingLender:
    """Lends a layer's gate/up and down stacks; see :class:`moeft.kernels.experts.spec.Lender`.

    Args:
        ring: Through which the layer passes.
        layer: Its number there.
        image: How it lies in a slot.
    """

    def __init__(self, ring: Ring, layer: int, image: Image) -> None:
        self.ring = ring
        self.layer = layer
        self.image = image

    @property
    def device(self) -> torch.device:
        """Device of the slots."""
        return self.ring.copier.device

    @contextmanager
    def lend(self) -> Iterator[tuple[NF4Weight, NF4Weight]]:
        """Gate/up and down as views of a slot."""
        with self.ring.borrow(self.layer) as memory:
            gate_up, down = self.image.weights(memory)
            yield gate_up, down
