"""Replies that a model draws to prompts itself, kept in a file that an interrupted run goes on with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moeft.data.files import open_records
from moeft.errors import DataError
from moeft.progress_bar import Callback
from moeft.provenance.files import append_line, drop_torn_line, read_lines

BATCH_SIZE = 8
EXPECTED = "expected prompt, a text or messages, or messages with a turn of the user"

Messages = list[dict[str, Any]]


def read_prompts(path: Path) -> list[Messages]:
    """The requests of a file: ``prompt``, a text or messages, or ``messages`` up to the last turn of the user.

    Raises:
        DataError: If a record has none, with its line; or as :func:`open_records` does.
    """
    return [_prompt(record, f"{path} line {line}") for line, record in open_records(path)]


def own_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Messages],
    kept: Path,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    progress: Callback | None = None,
) -> list[dict[str, Any]]:
    """Draw a reply to some of the prompts from the model, at temperature 1 and from all tokens.

    Args:
        model: A causal language model with ``generate``.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Messages before the reply.
        kept: File of finished replies; what an earlier call has left there is not drawn again.
        count: Prompts to take, drawn by ``seed``.
        max_new_tokens: Most tokens of a reply.
        seed: Of the choice of prompts and of the replies.
        progress: Called with replies done, replies in all and the word "replies".

    Returns:
        Rows of chat in the order of ``prompts``.

    Raises:
        DataError: If there is no prompt, or the tokenizer has no chat template.
    """
    if not prompts:
        raise DataError("there are no prompts to reply to; give at least one")
    chosen = sorted(random.Random(seed).sample(range(len(prompts)), min(count, len(prompts))))
    drop_torn_line(kept)
    replies = {line["prompt"]: line["reply"] for line in read_lines(kept)}
    left = [index for index in chosen if index not in replies]
    for place, reply in _drawn(model, tokenizer, [prompts[index] for index in left], max_new_tokens, seed):
        replies[left[place]] = reply
        append_line(kept, {"prompt": left[place], "reply": reply})
        if progress is not None:
            progress(len(replies), len(chosen), "replies")
    return [{"messages": [*prompts[i], {"role": "assistant", "content": replies[i]}]} for i in chosen]


def _drawn(
    model: Any, tokenizer: Any, prompts: Sequence[Messages], max_new_tokens: int, seed: int
) -> Iterator[tuple[int, str]]:
    from moeft.evaluation.generation import Sampling, iterate_replies

    for start in range(0, len(prompts), BATCH_SIZE):
        # A batch of its own seed, so that equal prompts of different batches get different replies.
        batch = prompts[start : start + BATCH_SIZE]
        sampling = Sampling(temperature=1.0, seed=seed + len(prompts) - start)
        sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": BATCH_SIZE}
        for place, reply in iterate_replies(model, tokenizer, batch, sampling=sampling, **sizes):
            yield start + place, reply


def _prompt(record: Any, place: str) -> Messages:
    if isinstance(record, DataError):
        raise DataError(f"{place}: {record}") from record
    prompt = record.get("prompt", record.get("messages"))
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        turns = [index for index, turn in enumerate(prompt) if turn.get("role") == "user"]
        if turns:
            return prompt[: turns[-1] + 1]
    raise DataError(f"{place} has the keys {sorted(record)}; {EXPECTED}")
