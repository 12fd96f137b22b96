"""Perplexity of the assistant's turns in held-out conversations, by how far into the conversation they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeft.data.rows import Row
from moeft.errors import DataError
from moeft.evaluation.statistics import Estimate, bootstrap
from moeft.evaluation.turn_scores import score_turns


@dataclass(frozen=True)
class TurnPerplexity:
    """Of all assistant turns at one place in their conversations."""

    turn: int
    """The how-manieth turn of the assistant, from 1."""
    tokens: int
    perplexity: Estimate
    """Per token; its units are conversations."""


def conversation_perplexity(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, batch_size: int = 8, level: float = 0.95, seed: int = 0
) -> list[TurnPerplexity]:
    """Perplexity by turn, so that a model that loses the thread shows.

    Later turns come from fewer and other conversations, so compare a model before and after training at the same turn,
    not one turn with another.

    Args:
        model: As for :func:`moeft.evaluation.turn_scores.score_turns`.
        tokenizer: Its tokenizer, with a chat template.
        rows: Held-out conversations.
        batch_size: Conversations at a time.
        level: Of the confidence intervals.
        seed: Of the resampling.

    Returns:
        One entry per turn that a conversation has, in order.

    Raises:
        DataError: If there are no rows, or one cannot be encoded.
    """
    if not rows:
        raise DataError("no held-out conversations, expected at least one")
    scores = score_turns(model, tokenizer, rows, batch_size=batch_size)
    found: list[TurnPerplexity] = []
    for turn in range(max(map(len, scores))):
        units = [(row[turn].log_prob, row[turn].tokens) for row in scores if len(row) > turn]
        estimate = bootstrap(units, _perplexity, level=level, seed=seed)
        found.append(TurnPerplexity(turn + 1, sum(tokens for _, tokens in units), estimate))
    return found


def _perplexity(units_n2: NDArray[np.float64]) -> float:
    log_prob, tokens = units_n2.sum(axis=0)
    return float(np.exp(-log_prob / tokens))
