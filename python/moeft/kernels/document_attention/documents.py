"""Where the documents of a batch lie: known on the host, so that nobody has to ask a device for it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

MOST_WASTE = 2
"""Times the tokens of a run that its documents would have if all were as long as the longest."""


class Documents:
    """Documents one behind the other, which together are all tokens of a batch.

    Args:
        lengths: Tokens of each; a length of zero stands for no document.

    Raises:
        ValueError: If a length is negative, or there is no document.

    Attributes:
        lengths: Tokens of each.
        num_tokens: Tokens of all.
        longest: Tokens of the longest.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = tuple(length for length in lengths if length)
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths of documents are {list(self.lengths)}, expected one or more above 0")
        self.num_tokens = sum(self.lengths)
        self.longest = max(self.lengths)
        self._offsets: dict[torch.device, Tensor] = {}

    def offsets(self, device: torch.device) -> Tensor:
        """``[N + 1]`` int32 for N documents, where each begins, then the end; copied once, without waiting."""
        if device not in self._offsets:
            # Memory that is not pinned would be copied when the device has done all that it was given before.
            is_pinned = device.type == "cuda" and torch.cuda.is_available()
            host = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, pin_memory=is_pinned)
            self._offsets[device] = host.to(device, non_blocking=True)
        return self._offsets[device]

    @functools.cached_property
    def runs(self) -> tuple[Documents, ...]:
        """The documents cut into runs of similar length: as long as the longest, they had at most twice the tokens.

        For kernels whose memory and shares of work go by the longest document times their number.
        """
        runs: list[list[int]] = []
        for length in self.lengths:
            run = [*runs[-1], length] if runs else []
            if run and len(run) * max(run) <= MOST_WASTE * sum(run):
                runs[-1] = run
            else:
                runs.append([length])
        return tuple(Documents(run) for run in runs)
