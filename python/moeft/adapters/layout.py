"""The layouts in which adapters of expert stacks are saved, and how to go from one to another.

Shapes: E experts, r rank, in and out the sizes of one expert's weight. Nothing here computes: elements are moved, so a
conversion there and back gives the same bits.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HEADER_KEY = "moeft.layout"
"""Metadata key under which a safetensors file names its layout."""


class Layout(StrEnum):
    """How the factors of expert stacks lie on disk.

    All but VLLM keep one pair of matrices per stack. PEFT: A ``[E * r, in]`` with row ``e * r + j``, B ``[out, r * E]``
    with column ``j * E + e``. The others differ as the two properties say. Sources: peft/tuners/lora/layer.py of 0.18.1
    and 0.21.2; unsloth-zoo pull requests 1232 and 1269; vllm/lora/model_manager.py.
    """

    PEFT = "peft"  # PEFT from 0.19.1, and what moeft saves
    PEFT018 = "peft018"  # PEFT up to 0.19.0
    UNSLOTH = "unsloth"  # unsloth before 2026-09-17
    UNSLOTH018 = "unsloth018"  # the same with PEFT up to 0.19.0
    VLLM = "vllm"  # a pair of matrices per expert and projection

    @property
    def swapped(self) -> bool:
        """Whether PEFT took outputs for inputs: A is ``[E * r, out]`` and holds B's values, B is ``[in, r * E]``."""
        return self in (Layout.PEFT018, Layout.UNSLOTH018)

    @property
    def grouped(self) -> bool:
        """Whether the columns of B lie together by expert: column ``e * r + j``."""
        return self in (Layout.UNSLOTH, Layout.UNSLOTH018)

    @property
    def header(self) -> str:
        """What :data:`HEADER_KEY` says."""
        return {"peft": "peft-0.19.1", "peft018": "peft-0.18"}.get(self, self.value)


STACKED = tuple(layout for layout in Layout if layout is not Layout.VLLM)


def from_header(text: str) -> Layout | None:
    """The layout that a header names; None if it is none of ours."""
    return next((layout for layout in Layout if layout.header == text), None)


def split(layout: Layout, a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """One stack's matrices to ``[E, r, in]`` and ``[E, out, r]``, as views."""
    a_Erx = a.view(num_experts, -1, a.shape[1])
    if layout.grouped:
        b_Eyr = b.view(b.shape[0], num_experts, -1).transpose(0, 1)
    else:
        b_Eyr = b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return (b_Eyr.transpose(1, 2), a_Erx.transpose(1, 2)) if layout.swapped else (a_Erx, b_Eyr)


def join(layout: Layout, a_Eri: Tensor, b_Eor: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`split`, contiguous."""
    if layout.swapped:
        a_Eri, b_Eor = b_Eor.transpose(1, 2), a_Eri.transpose(1, 2)
    b_oEr = b_Eor.transpose(0, 1)
    b = b_oEr if layout.grouped else b_oEr.transpose(1, 2)
    return a_Eri.reshape(-1, a_Eri.shape[2]).contiguous(), b.reshape(b.shape[0], -1).contiguous()
