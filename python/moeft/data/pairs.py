"""Preference rows to token ids: both answers behind the same prompt, and which of their tokens are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict, get_args, overload

import numpy as np
from numpy.typing import NDArray

from moeft.config.sources import PairTooLong, Reasoning
from moeft.data.example import Example, Examples
from moeft.data.preferences import PreferenceRow, PreferenceRows
from moeft.data.rejects import Reject
from moeft.data.rendering import REFUSALS, Renderer
from moeft.data.rows import Message, Row
from moeft.data.tokens import as_written, fast_tokenizer, trained_tokens
from moeft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Side = tuple[NDArray[np.int32], NDArray[np.bool_]]


class Pair(TypedDict):
    """Two encoded answers to one prompt; labels are -100 up to the answer."""

    chosen: Example
    rejected: Example
    num_shared: int
    """Tokens with which both begin and of which none is compared; at least 1."""
    reference: NDArray[np.float64]
    """``[2]``, log-probability of chosen and rejected under the reference; NaN where it is not known."""
    row: int
    """Place among the pairs."""
    input_ids: NDArray[np.int32]
    """Both sequences one after the other: what is counted when rows of like length are grouped."""


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """Encoded pairs in flat arrays."""

    chosen: Examples
    rejected: Examples
    num_shared: NDArray[np.int64]
    """``[N]``, tokens of each pair with which both sides begin and of which none is compared."""
    lines: NDArray[np.int64]
    """``[N]``, lines in the source."""
    reference: NDArray[np.float64]
    """``[N, 2]``, log-probabilities under the reference, as sums; NaN where they are not known."""

    def take(self, rows: NDArray[np.int64]) -> Pairs:
        """Some pairs, in this order."""
        return Pairs(
            self.chosen.take(rows),
            self.rejected.take(rows),
            self.num_shared[rows],
            self.lines[rows],
            self.reference[rows],
        )

    @classmethod
    def join(cls, parts: Sequence[Pairs]) -> Pairs:
        """Several data sets as one, in their order."""
        return cls(
            Examples.join([part.chosen for part in parts]),
            Examples.join([part.rejected for part in parts]),
            np.concatenate([part.num_shared for part in parts]),
            np.concatenate([part.lines for part in parts]),
            np.concatenate([part.reference for part in parts]),
        )

    def with_reference(self, reference: NDArray[np.float64]) -> Pairs:
        """The same pairs with log-probabilities under the reference."""
        return replace(self, reference=reference)

    def __len__(self) -> int:
        return len(self.num_shared)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        chosen, rejected = self.chosen[index], self.rejected[index]
        return {
            "chosen": chosen,
            "rejected": rejected,
            "num_shared": int(self.num_shared[index]),
            "reference": self.reference[index],
            "row": index,
            "input_ids": np.concatenate([chosen["input_ids"], rejected["input_ids"]]),
        }

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded pairs in their order, and every row that was left out, with its reason."""

    pairs: Pairs
    rejects: list[Reject]
    num_shortened: int = 0
    """Pairs that were cut to fit ``max_length``."""

    @classmethod
    def join(cls, parts: Sequence[EncodedPairs]) -> EncodedPairs:
        """Several data sets as one, in their order."""
        return cls(
            Pairs.join([part.pairs for part in parts]),
            [reject for part in parts for reject in part.rejects],
            sum(part.num_shortened for part in parts),
        )

    def __str__(self) -> str:
        tokens = len(self.pairs.chosen.input_ids) + len(self.pairs.rejected.input_ids)
        compared = self.pairs.chosen.num_trained + self.pairs.rejected.num_trained
        return f"{len(self.pairs)} pairs, {tokens} tokens, {compared} compared, {len(self.rejects)} rejected" + (
            f", {self.num_shortened} shortened" if self.num_shortened else ""
        )


def encode_pairs(
    rows: PreferenceRows,
    tokenizer: PreTrainedTokenizerFast,
    *,
    reasoning: Reasoning = "keep",
    max_length: int | None = None,
    on_too_long: PairTooLong = "reject",
) -> EncodedPairs:
    """Encode preference rows; those that cannot be used join the rejects of ``rows``.

    Args:
        rows: From :func:`moeft.data.preferences.read_preferences`.
        tokenizer: A fast tokenizer with a chat template.
        reasoning: What becomes of the assistant's thoughts.
        max_length: Most tokens of prompt and answer, for the longer of both answers.
        on_too_long: What becomes of a longer pair: "reject" lists it, "truncate" cuts the ends of the answers,
            "truncate_left" the beginning of the prompt, alike on both sides.

    Raises:
        DataError: If the tokenizer cannot be used, or no pair is left.
        ValueError: If an option makes no sense.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2, or None for no limit")
    if on_too_long not in get_args(PairTooLong):
        raise ValueError(f"on_too_long is {on_too_long!r}, expected one of {', '.join(get_args(PairTooLong))}")
    backend = fast_tokenizer(tokenizer)
    render = Renderer(tokenizer, "messages", reasoning)
    rejects = list(rows.rejects)
    kept: list[tuple[_Side, _Side, int, int]] = []
    num_shortened = 0

    def side(row: PreferenceRow, answer: list[Message]) -> _Side:
        text, spans, untrained = render(Row(_flagged(row.prompt, False) + _flagged(answer, True), row.line, row.tools))
        encoding = backend.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32), trained_tokens(encoding, spans, untrained)

    with as_written(backend):
        for row in rows.rows:
            try:
                whole = side(row, row.chosen), side(row, row.rejected)
                chosen, rejected = _fit(*whole, max_length, on_too_long)
                kept.append((chosen, rejected, _check(chosen, rejected), row.line))
                num_shortened += len(chosen[0]) < len(whole[0][0]) or len(rejected[0]) < len(whole[1][0])
            except DataError as error:
                rejects.append(Reject(row.line, str(error), rows.source))
            except REFUSALS as error:
                rejects.append(Reject(row.line, f"the chat template refuses the row: {error}", rows.source))
    if not kept:
        first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{rows.source}: no pair is left to train on. First reasons: {first or 'there were no rows'}")
    pairs = Pairs(
        Examples.of(chosen for chosen, _, _, _ in kept),
        Examples.of(rejected for _, rejected, _, _ in kept),
        np.array([shared for _, _, shared, _ in kept], np.int64),
        np.array([line for _, _, _, line in kept], np.int64),
        np.full((len(kept), 2), np.nan),
    )
    return EncodedPairs(pairs, sorted(rejects, key=lambda reject: reject.line), num_shortened)


def _flagged(messages: list[Message], train: bool) -> list[Message]:
    """Messages whose assistant turns are compared or not, whatever the row says of single turns."""
    return [{**message, "train": train} if message["role"] == "assistant" else message for message in messages]


def _fit(chosen: _Side, rejected: _Side, max_length: int | None, on_too_long: PairTooLong) -> tuple[_Side, _Side]:
    longest = max(len(chosen[0]), len(rejected[0]))
    if max_length is None or longest <= max_length:
        return chosen, rejected
    shared = _num_shared(chosen, rejected)
    if on_too_long == "reject":
        raise DataError(f"{longest} tokens, max_length is {max_length}")
    if on_too_long == "truncate":
        if shared >= max_length:
            raise DataError(f"the prompt has {shared} tokens, max_length is {max_length}: nothing is left of an answer")
        return (chosen[0][:max_length], chosen[1][:max_length]), (rejected[0][:max_length], rejected[1][:max_length])
    cut = longest - max_length
    if cut >= shared:
        raise DataError(
            f"{longest} tokens, max_length is {max_length}, and only {shared} of them are prompt that may be cut"
        )
    return (chosen[0][cut:], chosen[1][cut:]), (rejected[0][cut:], rejected[1][cut:])


def _check(chosen: _Side, rejected: _Side) -> int:
    """Tokens that both share at their front.

    Raises:
        DataError: If there is nothing to compare.
    """
    for name, (_, trained) in (("chosen", chosen), ("rejected", rejected)):
        if not trained[1:].any():
            raise DataError(f"{name} has no token that is compared")
    if np.array_equal(chosen[0], rejected[0]):
        raise DataError("chosen and rejected are the same tokens, so there is nothing to prefer")
    shared = _num_shared(chosen, rejected)
    if not shared:
        raise DataError("the answers share no token at their front, so they do not answer the same prompt")
    return shared


def _num_shared(chosen: _Side, rejected: _Side) -> int:
    most = min(len(chosen[0]), len(rejected[0]), int(chosen[1].argmax()), int(rejected[1].argmax()))
    differs = np.flatnonzero(chosen[0][:most] != rejected[0][:most])
    return int(differs[0]) if len(differs) else most
