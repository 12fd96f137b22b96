"""Rows as the model will see them, with what is trained: for looking at, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from moeft.config.sources import OnTooLong, Reasoning, TrainOn
from moeft.data.example import IGNORE_INDEX, Example, fit
from moeft.data.rendering import REFUSALS, Renderer
from moeft.data.rows import Reject, Row
from moeft.data.tokens import as_written, fast_tokenizer, trained_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Preview:
    """One row to look at."""

    line: int
    runs: list[tuple[str, bool]]
    """The text in runs of tokens, and whether these are trained."""
    num_tokens: int
    num_trained: int
    kept: str
    """What ``max_length`` does to the row; empty if it stays whole."""


def previews(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_on: TrainOn = "assistant",
    reasoning: Reasoning = "keep",
    max_length: int | None = None,
    on_too_long: OnTooLong = "reject",
) -> Iterator[Preview | Reject]:
    """Encode rows one at a time, as :func:`moeft.data.chat.encode` would.

    Raises:
        DataError: If the tokenizer is no fast one.
    """
    backend = fast_tokenizer(tokenizer)
    render = Renderer(tokenizer, train_on, reasoning)
    for row in rows:
        try:
            text, spans, untrained = render(row)
        except REFUSALS as error:
            yield Reject(row.line, str(error), "rows")
            continue
        with as_written(backend):
            encoding = backend.encode(text, add_special_tokens=False)
        trained = trained_tokens(encoding, spans, untrained)
        pieces, reason = fit(trained, max_length, on_too_long)
        if not pieces:
            yield Reject(row.line, reason, "rows")
            continue
        kept = ", ".join(f"{piece.start} to {piece.stop}" for piece in pieces)
        is_whole = pieces == [slice(0, len(trained))]
        runs: list[tuple[str, bool]] = []
        start = 0
        for is_trained, group in groupby(
            zip(trained.tolist(), encoding.offsets, strict=True), key=lambda pair: pair[0]
        ):
            stop = max(start, *(offsets[1] for _, offsets in group))
            runs.append((text[start:stop], is_trained))
            start = stop
        yield Preview(row.line, runs, len(trained), int(trained.sum()), "" if is_whole else f"kept: tokens {kept}")


def runs_of(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Text of an encoded row in runs of tokens, and whether these are trained."""
    ids = example["input_ids"].tolist()
    runs: list[tuple[str, bool]] = []
    stop, text = 0, ""
    for is_trained, group in groupby((example["labels"] != IGNORE_INDEX).tolist()):
        stop += len(list(group))
        # From the front, as decoders may take a first space away.
        whole = tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        runs.append((whole[len(text) :], is_trained))
        text = whole
    return runs


def bracketed(runs: Iterable[tuple[str, bool]], most: int) -> str:
    """Runs as one text, trained ones in ⟦brackets⟧; of a longer one the middle is left out."""
    return "".join(f"⟦{_shortened(text, most)}⟧" if trained else _shortened(text, most) for text, trained in runs)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {len(text) - most:,} characters … {text[-(most // 2) :]}"
