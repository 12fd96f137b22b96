"""The policy as it was before training, which is the reference: the same loaded weights, no second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class StartingPolicy:
    """Keeps in host memory what training will change, as far as it has an effect.

    A fresh adapter has none, its B being zero: nothing of it is kept.

    Args:
        model: The policy before its first step.
    """

    def __init__(self, model: Any) -> None:
        self._kept: dict[str, Tensor | None] = dict(_effective(model))

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of trainable parameters that had an effect at the start."""
        return ((name, value) for name, value in self._kept.items() if value is not None)

    @contextmanager
    def restored(self, model: Any) -> Iterator[None]:
        """The model computes as it did at the start inside, and as now again behind, after an error too."""
        named = {name: p for name, p in model.named_parameters() if name in self._kept}
        now = {name: p.detach().cpu().clone() for name, p in named.items()}
        try:
            _set(named, self._kept)
            yield
        finally:
            _set(named, now)


def _effective(model: Any) -> Iterator[tuple[str, Tensor | None]]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        is_factor = ".lora_A." in name or ".lora_B." in name
        partner = trained.get(name.replace(".lora_A.", ".lora_B."))
        if not is_factor or partner is None or bool(partner.any()):
            yield name, parameter.detach().cpu().clone()
        elif ".lora_B." in name:
            yield name, None


@torch.no_grad()
def _set(named: dict[str, Tensor], values: dict[str, Tensor | None] | dict[str, Tensor]) -> None:
    for name, parameter in named.items():
        value = values[name]
        parameter.zero_() if value is None else parameter.copy_(value)
