"""Text to tokens for scoring, as lm-eval's ``hf`` models do it, so that scores can be compared.

Source:
    https://github.com/EleutherAI/lm-evaluation-harness, ``encode_pair`` and rolling windows of version 0.4.13: what a
    continuation's tokens are is told by encoding the context alone and with it.
"""

from __future__ import annotations

from typing import Any

from moeft.errors import DataError
from moeft.evaluation.prefix_tree import Scored


def encode_continuation(tokenizer: Any, context: str, continuation: str, max_length: int) -> Scored:
    """Tokens of a context and its continuation, of which the continuation's are scored.

    Spaces at the end of the context go to the continuation. A pair that is too long loses tokens on the left.

    Args:
        tokenizer: The model's; it adds the special tokens that it adds to any text.
        context: May be empty, and is then the token that begins a text.
        continuation: What is scored.
        max_length: Positions of the model.

    Raises:
        DataError: If the continuation has no token, or more than the model has positions.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if context:
        whole = _encode(tokenizer, context + continuation)
        first = len(_encode(tokenizer, context))
    else:
        whole, first = tokenizer.encode(continuation, add_special_tokens=False), 1
        if whole[:1] != [_prefix(tokenizer)]:
            whole = [_prefix(tokenizer), *whole]
    scored = len(whole) - first
    if not 0 < scored <= max_length:
        raise DataError(f"the continuation {continuation[:60]!r} has {scored} tokens, expected 1 to {max_length}")
    cut = max(0, len(whole) - max_length - 1)
    return Scored(tuple(whole[cut:]), first - cut)


def encode_windows(tokenizer: Any, text: str, max_length: int) -> list[Scored]:
    """Windows over a text in which every token is scored once.

    The first window begins with the token that begins a text; each later one sees as much as fits of what comes before
    its tokens, and at least one token.

    Raises:
        DataError: If the text has no token.
    """
    tokens = _encode(tokenizer, text)
    if not tokens:
        raise DataError("a text has no token, expected at least one")
    windows = [Scored((_prefix(tokenizer), *tokens[:max_length]), 1)]
    done = max_length
    while done < len(tokens):
        end = min(done + max_length, len(tokens))
        start = max(0, end - max_length - 1)
        windows.append(Scored(tuple(tokens[start:end]), done - start))
        done = end
    return windows


def _encode(tokenizer: Any, text: str) -> list[int]:
    begins = text.startswith(tokenizer.decode(_prefix(tokenizer)))
    return tokenizer.encode(text, **({"add_special_tokens": False} if begins else {}))


def _prefix(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError("the tokenizer has neither a token that begins a text nor one that ends it; set one of them")
