"""Log-probability that a model gives to each assistant turn of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeft.data.chat import encode
from moeft.data.collate import PaddingCollator
from moeft.data.example import IGNORE_INDEX, Example
from moeft.data.rows import Message, Row
from moeft.errors import DataError
from moeft.integration.log_probs import token_log_probs


class TurnScore(NamedTuple):
    """Of one assistant turn, its end marker included."""

    log_prob: float
    """Sum over the tokens, in nats."""
    tokens: int


def score_turns(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, last_only: bool = False, batch_size: int = 8
) -> list[list[TurnScore]]:
    """Score the assistant turns of conversations, each given all that stands before it.

    Args:
        model: A causal language model with a linear head, with or without adapters.
        tokenizer: Its tokenizer, with a chat template.
        rows: Conversations.
        last_only: Score only the last assistant turn of each.
        batch_size: Conversations at a time.

    Returns:
        For every row the scores of its turns, in order.

    Raises:
        DataError: If a row cannot be encoded; the message says why.
        UnsupportedModelError: If the head is no linear layer.
    """
    # Which turns were trained does not matter to a measurement.
    plain = [replace(row, messages=[_unflagged(message) for message in row.messages]) for row in rows]
    examples: list[Example] = []
    for row in plain:
        encoded = encode([row], tokenizer, train_on="last" if last_only else "assistant")
        if encoded.rejects:
            raise DataError(f"line {row.line} cannot be scored: {encoded.rejects[0].reason}")
        examples += encoded.examples
    collate = PaddingCollator(tokenizer.pad_token_id or 0)
    scores: list[list[TurnScore]] = [[] for _ in examples]
    # Conversations of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    with evaluating(model), torch.inference_mode():
        device = next(model.parameters()).device
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch: dict[str, Any] = {
                name: tensor.to(device) for name, tensor in collate([examples[i] for i in chosen]).items()
            }
            labels_BS = batch.pop("labels")
            log_probs_BS = token_log_probs(model, labels_BS, **batch).cpu()
            for place, index in enumerate(chosen):
                scores[index] = _by_turn(log_probs_BS[place], labels_BS[place, 1:].cpu())
    return scores


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, and every module's own mode again behind, after an error too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not model.train(): modules that were in evaluation mode inside a training model stay as they were.
        for module in training:
            module.training = True


def _by_turn(log_probs_S: Tensor, labels_S: Tensor) -> list[TurnScore]:
    """Sums over runs of labels; the header of a turn has none, so turns never touch."""
    counts = (labels_S != IGNORE_INDEX).tolist()
    turns: list[TurnScore] = []
    start = None
    for index, is_label in enumerate([*counts, False]):
        if is_label and start is None:
            start = index
        elif not is_label and start is not None:
            turns.append(TurnScore(float(log_probs_S[start:index].double().sum()), index - start))
            start = None
    return turns


def _unflagged(message: Message) -> Message:
    copy: Message = message.copy()
    copy.pop("train", None)
    return copy
