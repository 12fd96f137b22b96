"""Rows to token ids and labels, with any fast tokenizer.

A row is rendered once (``moeft.data.rendering``) and tokenised once, without adding special tokens: the template writes
its own, and a second ``<bos>`` would be a token that the model never sees when it generates. Character offsets map what
is trained to tokens (``moeft.data.tokens``); all other labels are -100.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeft.config.sources import OnTooLong, Reasoning, TrainOn
from moeft.data.example import Example, Examples, Tokens, check_length_options, fit
from moeft.data.marks import Span
from moeft.data.reading import RowStream
from moeft.data.rendering import REFUSALS, Renderer
from moeft.data.rows import Message, ReadSummary, Reject, Row, Rows, write_rejects
from moeft.data.tokens import as_written, fast_tokenizer, trained_tokens
from moeft.data.trained_turns import check_options
from moeft.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

CHUNK_CHARACTERS = 1_000_000
"""Text that is tokenised at once; its encodings take some 100 bytes per token."""


@dataclass(frozen=True)
class Encoded:
    """Encoded rows in their order, and every row that was left out, with its reason."""

    examples: Examples
    rejects: list[Reject]
    num_shortened: int = 0
    """Rows that were truncated or split to fit ``max_length``."""
    read: ReadSummary | None = None
    """What reading them gave; None if they came as objects, or from several sources."""

    @classmethod
    def join(cls, parts: Iterable[Encoded]) -> Encoded:
        """Several data sets as one, in their order."""
        parts = list(parts)
        return cls(
            Examples.join([part.examples for part in parts]),
            [reject for part in parts for reject in part.rejects],
            sum(part.num_shortened for part in parts),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return len(self.examples.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry a label."""
        return self.examples.num_trained

    def write_rejects(self, path: str | Path) -> None:
        """Write the rejects as JSON lines, ``{"source", "line", "reason"}``."""
        write_rejects(self.rejects, path)

    def __str__(self) -> str:
        return (
            f"{len(self.examples)} rows, {self.num_tokens} tokens, {self.num_trained_tokens} trained, "
            f"{len(self.rejects)} rejected" + (f", {self.num_shortened} shortened" if self.num_shortened else "")
        )


@dataclass(frozen=True)
class _Rendered:
    row: Row
    text: str
    spans: list[Span]
    untrained: list[Span]


def encode(
    rows: Rows | RowStream | Iterable[Row | Reject],
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_on: TrainOn = "assistant",
    reasoning: Reasoning = "keep",
    max_length: int | None = None,
    on_too_long: OnTooLong = "reject",
    folder: Path | None = None,
) -> Encoded:
    """Encode rows; those that cannot be trained on join the rejects of ``rows``.

    Args:
        rows: From ``read_rows``, or a :class:`RowStream` or any iterable, which is read as it is encoded; rejects in it
            stay rejects.
        tokenizer: A fast tokenizer; with a chat template, unless all rows are plain texts.
        train_on: Which turns are trained.
        reasoning: What becomes of the assistant's thoughts.
        max_length: Most tokens of an example.
        on_too_long: What becomes of a longer row: "reject" lists it, "truncate" keeps its first tokens,
            "truncate_left" its last ones, and "split" cuts it into several examples.
        folder: Where to write the arrays of the examples; None holds them in memory.

    Raises:
        DataError: If the tokenizer cannot be used, or no row is left, or as iterating ``rows`` does.
        ValueError: If an option makes no sense.
    """
    check_options(train_on, reasoning)
    check_length_options(max_length, on_too_long)
    backend = fast_tokenizer(tokenizer)
    renderer = Renderer(tokenizer, train_on, reasoning)
    counted = rows if isinstance(rows, Rows | RowStream) else None
    source = "rows" if counted is None else counted.source
    rejects = list(rows.rejects) if isinstance(rows, Rows) else []
    items = rows.rows if isinstance(rows, Rows) else rows
    shortened: list[int] = []

    def kept() -> Iterator[Tokens]:
        for row, ids, trained in _tokenized(_rendered(items, renderer, source, rejects), backend):
            pieces, reason = fit(trained, max_length, on_too_long)
            if not pieces:
                rejects.append(Reject(row.line, reason, source))
            elif pieces != [slice(0, len(ids))]:
                shortened.append(row.line)
            yield from ((ids[piece], trained[piece]) for piece in pieces)

    with as_written(backend):
        examples = Examples.of(kept()) if folder is None else Examples.written(kept(), folder)
    if not examples:
        first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{source}: no row is left to train on. First reasons: {first or 'there were no rows'}")
    rejects.sort(key=lambda reject: reject.line)
    return Encoded(examples, rejects, len(shortened), None if counted is None else counted.summary)


def encode_messages(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_on: TrainOn = "assistant",
    reasoning: Reasoning = "keep",
) -> Example:
    """Encode one conversation, whatever its length.

    Raises:
        DataError: If what the assistant said cannot be told, or none of it is to be trained.
        jinja2.exceptions.TemplateError: If the template refuses the messages.
        ValueError: If an option makes no sense.
    """
    check_options(train_on, reasoning)
    backend = fast_tokenizer(tokenizer)
    text, spans, untrained = Renderer(tokenizer, train_on, reasoning)(Row(list(messages), 1))
    with as_written(backend):
        encoding = backend.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, np.int32)
    return Examples.of([(ids, trained_tokens(encoding, spans, untrained))])[0]


def _rendered(
    rows: Iterable[Row | Reject], render: Renderer, source: str, rejects: list[Reject]
) -> Iterator[list[_Rendered]]:
    """Rendered rows in chunks of :data:`CHUNK_CHARACTERS`; those that cannot be rendered go to the rejects."""
    chunk: list[_Rendered] = []
    characters = 0
    for row in rows:
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        try:
            chunk.append(_Rendered(row, *render(row)))
        except DataError as error:
            rejects.append(Reject(row.line, str(error), source))
            continue
        except REFUSALS as error:
            rejects.append(Reject(row.line, f"the chat template refuses the row: {error}", source))
            continue
        characters += len(chunk[-1].text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenized(
    chunks: Iterable[list[_Rendered]], backend: Tokenizer
) -> Iterator[tuple[Row, NDArray[np.int32], NDArray[np.bool_]]]:
    """Token ids and trained tokens of rows, in their order; one chunk is tokenised while the next is rendered."""
    waiting: deque[tuple[list[_Rendered], Future[list[Encoding]]]] = deque()

    def finished() -> Iterator[tuple[Row, NDArray[np.int32], NDArray[np.bool_]]]:
        chunk, future = waiting.popleft()
        for item, encoding in zip(chunk, future.result(), strict=True):
            yield item.row, np.array(encoding.ids, np.int32), trained_tokens(encoding, item.spans, item.untrained)

    with ThreadPoolExecutor(1) as pool:
        for chunk in chunks:
            texts = [item.text for item in chunk]
            waiting.append((chunk, pool.submit(backend.encode_batch, texts, add_special_tokens=False)))
            if len(waiting) > 1:
                yield from finished()
        while waiting:
            yield from finished()
