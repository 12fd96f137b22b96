"""Which pairs of a pack see each other: the mask beside which attention inside documents is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visible(lengths: Sequence[int], rows: int, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """``[rows, S, S]`` bool: which keys a query sees.

    Args:
        lengths: Tokens of the documents of all rows, one behind the other.
        rows: Rows that they fill, of S tokens each.
        window: Tokens that a query sees at most, itself included; None for all before it.
        device: Where the mask is made.
    """
    counts = torch.tensor(lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(counts).view(rows, -1)
    place = torch.arange(document.shape[1], device=device)
    distance = place[:, None] - place
    return (document[:, :, None] == document[:, None]) & (distance >= 0) & (distance < (window or len(place)))
