"""What differs between the experts of model families: how a stack is stored, and how gate and up are combined.

Shapes: E experts, H hidden, I expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moeft.kernels.nf4 import NF4Weight


class ExpertLayout(NamedTuple):
    """How the stacks of a layer are stored.

    ``transposed``: ``gate_up [E, H, 2I]`` and ``down [E, I, H]`` instead of ``[E, 2I, H]`` and ``[E, H, I]``.
    ``interleaved``: along the axis of 2I, gate and up alternate instead of all gates coming first.
    """

    transposed: bool = False
    interleaved: bool = False

    def gate_up_shape(self, num_experts: int, inner: int, hidden: int) -> tuple[int, int, int]:
        """Shape of the stack of gate and up."""
        return (num_experts, hidden, 2 * inner) if self.transposed else (num_experts, 2 * inner, hidden)

    def sizes(self, down_shape: torch.Size) -> tuple[int, int, int]:
        """E, I and H from the shape of the down stack."""
        num_experts, rows, columns = down_shape
        return (num_experts, rows, columns) if self.transposed else (num_experts, columns, rows)

    def split(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, ``[..., I]`` each, as views of ``[..., 2I]``."""
        if self.interleaved:
            return h[..., ::2], h[..., 1::2]
        gate, up = h.chunk(2, dim=-1)
        return gate, up

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)


PLAIN = ExpertLayout()


class Lender(Protocol):
    """Holds the stacks of a block elsewhere, and brings them to a device for as long as they are computed with."""

    @property
    def device(self) -> torch.device:
        """Where borrowed stacks lie."""

    def lend(self) -> AbstractContextManager[tuple[NF4Weight, NF4Weight]]:
        """Gate/up and down, valid inside the context for what is launched there."""


class Weights(NamedTuple):
    """Frozen weights of an expert block; see :func:`moeft.kernels.experts`.

    With a ``lender``, the stacks here say only how the borrowed ones look.
    """

    gate_up: NF4Weight | Tensor
    down: NF4Weight | Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    layout: ExpertLayout = PLAIN
    lender: Lender | None = None

    @contextmanager
    def in_place(self) -> Iterator[Weights]:
        """The weights, on the device while the context lasts; forward and backward each ask for them."""
        if self.lender is None:
            yield self
            return
        with self.lender.lend() as (gate_up, down):
            yield self._replace(gate_up=gate_up, down=down, lender=None)


class ClampedSwiglu(NamedTuple):
    """The activation of gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)`` of clamped gate and up.

    Source:
        transformers, ``GptOssExperts._apply_gate``
    """

    alpha: float
    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activation of ``[..., I]``; the gate is clamped from above, up from both sides."""
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


# A function of the gate alone, which multiplies up; or one of both.
Activation = Callable[[Tensor], Tensor] | ClampedSwiglu


def activate(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Input of the down projection, ``[..., I]``."""
    return activation(gate, up) if isinstance(activation, ClampedSwiglu) else activation(gate) * up
