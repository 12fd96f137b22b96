"""Varied texts, drawn from a seed, on which two tokenizers are compared."""

from __future__ import annotations

import random
from collections.abc import Callable

ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "accents": "äöüßéèêçñøåæœšžłđÄÖÜÉÑ",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת",
    "devanagari": "अआइईउऊकखगघचछजझटठडढतथदधनपफबभमयरलवशषसह",
    "han": "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年",
    "kana": "あいうえおかきくけこさしすせそアイウエオカキクケコ",
    "hangul": "가나다라마바사아자차카타파하한국어",
    "digits": "0123456789",
    "symbols": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~€£°§«»„“”’…–—",
    "emoji": "😀🙏🏽👩‍👩‍👧‍👦🇩🇪❤️🔥✅",
    "marks": "e\u0301a\u0308n\u0303\u200d\u200b\ufe0f",
    "controls": "\x00\x01\x07\x1b\x7f",
}
SPACES = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000")
_PROSE = (
    "The river don't we'll I'm they've HE'S won't it's rising since noon; by evening it stood two steps below. "
    "def mean(values): return sum(values) / len(values) # 3.14e-10 0x7fff 1,234,567.89 12:45 2026-11-21 "
    '{"name": "check", "args": [1, 22, 333, 4444, 55555]} https://example.org/a?b=c&d=%20 user@example.org '
    "Größenwahn naïve café señor Ελλάδα Москва 東京都 서울 नमस्ते"
)
WORDS = _PROSE.split(" ")


def varied_texts(count: int, seed: int = 0) -> list[str]:
    """As many texts as asked for, none empty."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (_words, _one_alphabet, _mixture, _spaces)
    return [rng.choice(kinds)(rng) for _ in range(count)]


def _words(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randrange(1, 16)))


def _one_alphabet(rng: random.Random) -> str:
    letters = ALPHABETS[rng.choice(list(ALPHABETS))]
    return "".join(rng.choice(letters) for _ in range(rng.randrange(1, 30)))


def _mixture(rng: random.Random) -> str:
    return "".join(rng.choice(ALPHABETS[rng.choice(list(ALPHABETS))]) for _ in range(rng.randrange(1, 40)))


def _spaces(rng: random.Random) -> str:
    return "".join(rng.choice(SPACES) if rng.random() < 0.6 else rng.choice(WORDS) for _ in range(rng.randrange(1, 20)))
