"""Losses over pairs of log-probabilities.

Shapes: B pairs; the last axis of ``[B, 2]`` holds chosen, then rejected. With h the difference of the rewards, beta
times log-probability over that of the reference:

=================  ====================================================================================
``sigmoid``        ``-log sigmoid(h)``, smoothed by epsilon; DPO, https://arxiv.org/abs/2305.18290
``sigmoid_norm``   the same of means over tokens
``ipo``            ``(h / beta - 1 / (2 beta))^2``; IPO, https://arxiv.org/abs/2310.12036, of means as its authors do
``hinge``          ``max(0, 1 - h)``; SLiC, https://arxiv.org/abs/2305.10425
``robust``         the smoothed loss without its bias; https://arxiv.org/abs/2403.00409
``orpo``           ``-beta log sigmoid(log odds ratio)`` beside the chosen answer's loss; https://arxiv.org/abs/2403.07691
``simpo``          ``-log sigmoid(h - margin)``, without reference; https://arxiv.org/abs/2405.14734
=================  ====================================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moeft.config.preference import PreferenceLoss


class PairLosses(NamedTuple):
    """Of each pair."""

    loss: Tensor
    """``[B]``"""
    rewards: Tensor
    """``[B, 2]``, ``beta`` times the log-probability, a sum or a mean as in the loss, less that of its reference."""


def pair_losses(loss: PreferenceLoss, sums_B2: Tensor, counts_B2: Tensor, reference_B2: Tensor | None) -> PairLosses:
    """Loss and rewards of pairs.

    Args:
        loss: Which loss.
        sums_B2: Log-probabilities of the answers under the policy, summed over tokens.
        counts_B2: Tokens of the answers, at least 1.
        reference_B2: Sums under the reference; not needed by a loss without one.

    Raises:
        ValueError: If the loss needs a reference and there is none.
    """
    means_B2 = sums_B2 / counts_B2
    scores_B2 = means_B2 if loss.is_mean else sums_B2
    if loss.needs_reference:
        if reference_B2 is None:
            raise ValueError(f"{loss.name} compares with a reference, and there are no log-probabilities under one")
        reference_B2 = reference_B2.to(scores_B2.dtype)
        scores_B2 = scores_B2 - (reference_B2 / counts_B2 if loss.is_mean else reference_B2)
    rewards_B2 = loss.beta * scores_B2
    loss_B = _preference(loss, scores_B2, rewards_B2[:, 0] - rewards_B2[:, 1])
    return PairLosses(loss_B - loss.weight_of_sft * means_B2[:, 0], rewards_B2.detach())


def _preference(loss: PreferenceLoss, scores_B2: Tensor, h_B: Tensor) -> Tensor:
    epsilon = loss.label_smoothing
    if loss.name == "ipo":
        return (h_B / loss.beta - 1 / (2 * loss.beta)).square()
    if loss.name == "hinge":
        return torch.relu(1 - h_B)
    if loss.name == "robust":
        return (-(1 - epsilon) * logsigmoid(h_B) + epsilon * logsigmoid(-h_B)) / (1 - 2 * epsilon)
    if loss.name == "orpo":
        log_odds_B2 = scores_B2 - _log_one_minus_exp(scores_B2)
        return -loss.beta * logsigmoid(log_odds_B2[:, 0] - log_odds_B2[:, 1])
    if loss.name == "simpo":
        h_B = h_B - loss.simpo_margin
    return -(1 - epsilon) * logsigmoid(h_B) - epsilon * logsigmoid(-h_B)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x below 0; an x that was rounded to 0 is taken for the next number below."""
    # A probability of one has infinite odds, and their gradient would be NaN.
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
