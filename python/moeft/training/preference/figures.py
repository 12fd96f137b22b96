"""Figures of pairs, over all pairs since the last reading.

Shapes: B pairs; the last axis of ``[B, 2]`` holds chosen, then rejected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeft.training.preference.losses import PairLosses
from moeft.training.preference.scores import PairScores

KEYS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "log_probs/chosen",
    "log_probs/rejected",
    "log_probs/accuracy",
    "log_probs/chosen_drift",
    "lengths/won",
    "lengths/lost",
    "kl",
)
"""Names of figures in logs; see ``docs/preference.md``."""


class PairFigures:
    """Collects what a loss found about pairs; nothing waits for the device until it is read."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def add(self, losses: PairLosses, scores: PairScores, reference_B2: Tensor) -> None:
        """Take note of some pairs; a reference of NaN is one that is not known."""
        columns = (losses.loss[:, None], losses.rewards, scores.sums, scores.counts, reference_B2)
        self._seen.append(torch.cat([column.detach().double() for column in columns], 1))

    def read(self, is_mean: bool) -> dict[str, float]:
        """Means over pairs since the last reading; empty if there were none.

        Args:
            is_mean: Whether log-probabilities are shown as means over tokens, as the loss takes them.

        Returns:
            ``loss``; ``rewards/`` of chosen and rejected, their margin, and the share of pairs whose chosen reward is
            larger; ``log_probs/`` of both, the share of pairs whose chosen one is larger, with no look at the
            reference, and, in nats per token, how far the chosen answer's has moved from the reference's;
            ``lengths/``: tokens of chosen less those of rejected, over pairs won and lost.
        """
        if not self._seen:
            return {}
        table = torch.cat(self._seen).cpu()
        self._seen = []
        loss, rewards, sums, counts, reference = table.split((1, 2, 2, 2, 2), dim=1)
        shown = sums / counts if is_mean else sums
        longer, won = counts[:, 0] - counts[:, 1], rewards[:, 0] > rewards[:, 1]
        figures = {
            "loss": loss.mean(),
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/margin": (rewards[:, 0] - rewards[:, 1]).mean(),
            "rewards/accuracy": won.double().mean(),
            "log_probs/chosen": shown[:, 0].mean(),
            "log_probs/rejected": shown[:, 1].mean(),
            "log_probs/accuracy": (shown[:, 0] > shown[:, 1]).double().mean(),
            "log_probs/chosen_drift": ((sums - reference) / counts)[:, 0].mean(),
            "lengths/won": longer[won].mean(),
            "lengths/lost": longer[~won].mean(),
        }
        # Of no pair there is no mean, and of an unknown reference no drift.
        optional = ("log_probs/chosen_drift", "lengths/won", "lengths/lost")
        return {name: float(value) for name, value in figures.items() if name not in optional or not value.isnan()}
