"""Other ways of asking the same: a polite beginning, an exchange before it, other words for what is no argument."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from moeft.hard.draft import with_last_turn
from moeft.hard.requests import Request
from moeft.hard.workshop import Workshop, is_single

OPENERS = ("Quick one: ", "For the record, ", "One more thing: ", "By the way, ")
"""Fit before any sentence."""
ORDERS = ("Please ", "Could you ", "I need you to ", "When you have a moment, ")
"""Fit before an order alone, which is what is left of a text that begins with one of these."""
SYNONYMS = {
    "can you": "could you",
    "could you": "can you",
    "help me": "assist me",
    "i need to": "i have to",
    "i want to": "i would like to",
    "i would like to": "i want to",
    "please": "kindly",
    "check": "verify",
    "tell me": "let me know",
}
_ASKED = re.compile(
    r"^(?:please|could you(?: please)?|can you|i need you to|hey,|we have to|time to)\s+", re.IGNORECASE
)


def augmented(shop: Workshop, request: Request, share: float) -> Request:
    """A request as it is, or asked otherwise with a probability of ``share``.

    Values of arguments stay as they stand in the text; the user's last turn alone changes, and what stands before it.
    """
    if shop.rng.random() >= share:
        return request
    kind = shop.rng.choice(("prefix", "paraphrase", "exchange"))
    if kind == "exchange" and is_single(request):
        return _after_exchange(shop, request)
    text = _opened(request.text, shop.rng) if kind == "prefix" else _paraphrased(request, shop.rng)
    return replace(request, prompt=with_last_turn(request.prompt, text))


def _opened(text: str, rng: random.Random) -> str:
    bare = _ASKED.sub("", text)
    opener = rng.choice(OPENERS if bare == text else ORDERS)
    return opener + (bare[0].lower() + bare[1:] if bare[1:2].islower() else bare)


def _paraphrased(request: Request, rng: random.Random) -> str:
    values = " ".join(str(value) for call in request.calls for value in call.arguments.values()).lower()
    candidates = [words for words in SYNONYMS if words not in values]
    found = [words for words in candidates if re.search(rf"\b{words}\b", request.text, re.IGNORECASE)]
    if not found:
        return _opened(request.text, rng)
    words = rng.choice(found)

    def other(match: re.Match[str]) -> str:
        is_capital = match[0][0].isupper()
        return SYNONYMS[words].capitalize() if is_capital else SYNONYMS[words]

    return re.sub(rf"\b{words}\b", other, request.text, count=1, flags=re.IGNORECASE)


def _after_exchange(shop: Workshop, request: Request) -> Request:
    """The request behind another one that was done."""
    others = [other for other in shop.requests if is_single(other) and other.after and other.calls != request.calls]
    if not others:
        return replace(request, prompt=with_last_turn(request.prompt, _opened(request.text, shop.rng)))
    earlier = shop.rng.choice(others)
    return replace(request, prompt=[*earlier.prompt, {"role": "assistant", "content": earlier.after}, *request.prompt])
