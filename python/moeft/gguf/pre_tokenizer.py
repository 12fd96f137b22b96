"""How a byte-level BPE cuts a text into words before it merges, as the name that llama.cpp knows it by.

Source: llama.cpp, src/llama-vocab.cpp; every name stands for regular expressions that are compiled into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft.errors import UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|\p{{N}}|{_REST}": "qwen2",
}
"""Regular expression of a ``Split`` -> name."""
# GPT-2's expression, which is inside of ByteLevel, under its name and those of models that llama.cpp lists apart.
GPT2 = ("gpt-2", "olmo")
GPT2_DIGITS = "smollm"


def pre_tokenizer(document: Mapping[str, Any], default: str, path: Path) -> str:
    """The name for a ``tokenizer.json``.

    Args:
        document: Its content.
        default: Name of the architecture, taken where the file says nothing about words.
        path: Where it lies, for messages.

    Raises:
        UnsupportedModelError: If it cuts in a way for which no name is known here.
    """
    parts = _parts(document.get("pre_tokenizer"))
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and not parts[0].get("add_prefix_space"):
        if not parts[0].get("use_regex", True):
            return default
        return default if default in GPT2 else GPT2[0]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = parts[0].get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if parts[0].get("behavior") == "Isolated" and expression in SPLITS:
            return SPLITS[expression]
    if not parts:
        return default
    raise UnsupportedModelError(
        f"{path} cuts texts by {document['pre_tokenizer']}, for which no pre-tokenizer of llama.cpp is known here: its "
        "texts would fall into other tokens; known are those of GPT-2, SmolLM, Llama 3 and Qwen 2 and 3"
    )


def _parts(found: Any) -> list[Mapping[str, Any]]:
    if not isinstance(found, Mapping):
        return []
    inner = found.get("pretokenizers") if found.get("type") == "Sequence" else [found]
    return [part for part in inner if isinstance(part, Mapping)] if isinstance(inner, list) else []
