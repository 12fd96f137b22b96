"""Low-rank factors of a stack of experts, in PEFT's ``target_parameters`` layout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoraFactors(NamedTuple):
    """Factors of one stack: the delta of expert e is ``scaling * B_e @ A_e``.

    ``a`` is ``[E * r, in]`` with row ``e * r + j``; ``b`` is ``[out, r * E]`` with column ``j * E + e``: the expert is
    the slow axis of A and the fast axis of B. This is what PEFT >= 0.19.1 saves.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """The two factors."""
        return self.a, self.b


class ExpertLora(NamedTuple):
    """Factors of both stacks of an expert block; an absent one adds nothing."""

    gate_up: LoraFactors = LoraFactors()
    down: LoraFactors = LoraFactors()

    @property
    def scalings(self) -> tuple[float, float]:
        """Scaling of gate_up and of down."""
        return self.gate_up.scaling, self.down.scaling


def split_a(a: Tensor, num_experts: int) -> Tensor:
    """``[E * r, in]`` to ``[E, r, in]``, a view."""
    return a.view(num_experts, -1, a.shape[-1])


def split_b(b: Tensor, num_experts: int) -> Tensor:
    """``[out, r * E]`` to ``[E, out, r]``, a view."""
    return b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)


def join_b(b_Eor: Tensor) -> Tensor:
    """``[E, out, r]`` back to ``[out, r * E]``."""
    return b_Eor.permute(1, 2, 0).reshape(b_Eor.shape[1], -1).contiguous()
