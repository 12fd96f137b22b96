"""Texts to token ids, and character spans to tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeft.data.marks import Span
from moeft.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast


def fast_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """The Rust tokenizer inside of a fast tokenizer.

    Raises:
        DataError: If the tokenizer is none, and so gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer")
    backend: Any = tokenizer.backend_tokenizer
    return backend


@contextmanager
def as_written(backend: "Tokenizer") -> Iterator["Tokenizer"]:
    """A tokenizer that adds, cuts and pads nothing, and whose offsets hold the white space of a token.

    Post-processors of byte-level tokenizers shorten offsets by it, so that a token of white space would have none.
    """
    kept, truncation, padding = backend.post_processor, backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    try:
        yield backend
    finally:
        backend.post_processor = kept
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def trained_tokens(encoding: "Encoding", spans: Sequence[Span], untrained: Sequence[Span] = ()) -> NDArray[np.bool_]:
    """Which tokens of a text are trained.

    A token is trained if any of its characters is in a span, and none is in an untrained one: a token across the start
    of a reply is the one that the model has to write there. Bytes of one character share its offsets, and so its fate.
    A token without characters is trained if it stands between trained ones of one span.

    Args:
        encoding: From :func:`as_written`.
        spans: To train, in their order.
        untrained: Parts of them to leave out.

    Returns:
        ``[S]`` for S tokens.
    """
    trained = np.zeros(len(encoding), np.bool_)
    for value, group in ((True, spans), (False, untrained)):
        for span in group:
            trained[_range(encoding, span)] = value
    return trained


def _range(encoding: "Encoding", span: Span) -> slice:
    """Tokens from the first with a character in the span to the last.

    The offsets of all tokens as Python objects would cost a fifth of the tokenising, so few are asked for.
    """
    # A normaliser may drop characters; these belong to no token.
    first = next((t for c in range(span.start, span.stop) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None:
        return slice(0, 0)
    last = next(t for c in reversed(range(span.start, span.stop)) if (t := encoding.char_to_token(c)) is not None)
    # The first token of the last character was found; its further bytes follow.
    while last + 1 < len(encoding):
        start, stop = encoding.token_to_chars(last + 1) or (span.stop, span.stop)
        if start >= span.stop or start == stop:
            break
        last += 1
    return slice(first, last + 1)
